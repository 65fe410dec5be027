"""What is inferred: state-space models and priors; imported as `bayesinf.models`."""

if __name__ != "bayesinf.models":
    raise ImportError("import bayesinf.models, not models: this folder is only a part of bayesinf")

from bayesinf.models.state_space import StateSpaceModel as StateSpaceModel
