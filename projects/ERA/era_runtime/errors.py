"""The one exception for a user's mistake."""


class DeploymentError(ValueError):
    """A folder, an image or a request that cannot be used, told in one clear sentence."""
