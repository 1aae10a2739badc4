"""What TensorRT's ONNX parser takes of a graph of fixed shapes, and the command that builds an engine of it.

No TensorRT has run such a graph here: it is judged in onnxruntime, and by the documents of TensorRT.
"""

from __future__ import annotations

from pathlib import Path

from era.errors import UserError

# github.com/onnx/onnx-tensorrt, docs/operators.md of TensorRT 10.15, without those whose output's shape depends on the data
# (NonMaxSuppression, NonZero) and without control flow (If, Loop, Scan).
_LISTED = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu Clip
Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace Div Dropout Einsum Elu
Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity
InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LRN LpNormalization
LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu Pad
ParametricSoftplus Pow Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RoiAlign Round ScatterElements ScatterND Selu Shape Shrink
Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where Xor
"""
OPERATORS = frozenset(_LISTED.split())
MAX_TOPK = 3840  # docs.nvidia.com/deeplearning/tensorrt, operators, TopK
BUILD_COMMAND = "trtexec --onnx=model.onnx --saveEngine=model.engine --noTF32"
UNMEASURED = (
    "No TensorRT was at hand where this was made: the command is from its documents (10.x), and neither the building of the "
    "engine nor its numbers nor its speed were measured. The graph was compared with eager in onnxruntime (parity.json)."
)


def fold_constants(path: Path) -> None:
    """Replace what follows from the fixed shapes by its value, in place: onnxruntime's basic optimisations, which leave
    operators of ONNX alone."""
    import onnx
    import onnxruntime as ort

    folded = path.with_name(path.name + ".folded")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(folded))
    used = {node.domain for node in model.graph.node}
    for opset in list(model.opset_import):  # onnxruntime names all that it knows
        if opset.domain not in used:
            model.opset_import.remove(opset)
    onnx.save(model, str(path))
    folded.unlink()


def check_operators(path: Path) -> None:
    """Every operator is one of :data:`OPERATORS`, every shape a number.

    Raises:
        UserError: names the first that is not.
    """
    problems = operator_problems(path)
    if problems:
        raise UserError(
            f"a model of fixed shapes for TensorRT cannot be made of this detector: {problems[0]}; export it without --shape."
        )


def operator_problems(path: Path) -> list[str]:
    """What TensorRT would not take of an ONNX file, in words."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True, data_prop=True)  # fmt: skip
    graph = model.graph
    shapes = {
        value.name: _shape(value) for value in (*graph.input, *graph.value_info, *graph.output)
    }
    weights = {tensor.name: tensor for tensor in graph.initializer}
    problems = [
        f"its input {value.name} has an axis of any length"
        for value in graph.input
        if shapes[value.name] is None
    ]
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            problems.append(
                f"the operator {node.op_type} ({node.name}) is not among those that it lists"
            )
        problems += [
            f"the shape of {name}, which {node.op_type} gives, depends on the data"
            for name in node.output
            if name and shapes.get(name) is None
        ]
        if node.op_type == "TopK":
            most = weights.get(node.input[1])
            if most is None or int(onnx.numpy_helper.to_array(most).max()) > MAX_TOPK:
                problems.append(
                    f"{node.name} asks for more than the best {MAX_TOPK}, or for a number that is no constant"
                )
    return problems


def _shape(value) -> tuple[int, ...] | None:
    """Of a tensor of the graph; None if any axis has no number."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(axis.HasField("dim_value") for axis in kind.shape.dim):
        return None
    return tuple(axis.dim_value for axis in kind.shape.dim)
