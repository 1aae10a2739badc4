"""How a report names ERA's losses, and what it draws of them."""

from era.methods.base import Chart

_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

LOSS_LABELS = {
    "loss_era_feature": "feature: e₀ to the teacher's maps",
    "loss_era_residual": "residual: the branches",
    "loss_era_twi_rpn": "TWI: teacher's RPN head",
    "loss_era_twi_roi": "TWI: teacher's ROI head",
    "loss_era_twi_dense": "TWI: teacher's dense head",
    "loss_era_soft_rpn": "soft judges: teacher's RPN head",
    "loss_era_soft_roi": "soft judges: teacher's ROI head",
    "loss_era_soft_dense": "soft judges: teacher's dense head",
    "loss_era_roi_feature": "ROI feature: e₀ to the teacher's vectors",
    "loss_era_roi_residual": "ROI feature: the branches",
    "loss_era_roi_twi": "ROI feature: teacher's box predictor",
    "loss_era_roi_soft": "ROI feature: soft judges",
    "loss_era_kd": "KD: teacher's classes",
}
CHARTS = (
    Chart(
        title="what is left after each branch",
        y_label="mean of (F_T − e_i)² over the FPN levels",
        pattern=r"era/(?!roi/)\w+/residual_e(?P<curve>\d+)",
        curve_name=lambda i: "e₀ (no branch)" if i == "0" else f"e{i.translate(_SUBSCRIPT)}",
        log_scale=True,
        explanation="e₀ is the student's feature map brought to the teacher's channels; each branch of "
        "MBRNet adds a step, so e₁, e₂, … should come closer to the teacher's features F_T, and all should "
        "fall with training; with a standardised target they are in units of the teacher's variance. A "
        "lower residual is not a higher AP.",
        share="left after the branches",
    ),
    Chart(
        title="what the branches remove",
        y_label="1 − |F_T − e_N|² / |F_T − e₀|²",
        pattern=r"era/(?P<curve>\w+)/removed",
        curve_name=lambda level: level,
        explanation="The fraction of the distance from e₀ to the teacher's features that the branches of MBRNet "
        "take away together, by level: 0 where they do nothing, 1 where e_N is F_T, below 0 where they do harm.",
    ),
)
