"""What each model family *is*, as data: the role of every linear layer and what feeds it. One YAML a family."""

from ditq.architectures.architecture import (
    Architecture,
    Condition,
    InputGroup,
    Linear,
    load,
    match,
    names,
    pipeline_class,
    roles,
)

__all__ = ["Architecture", "Condition", "InputGroup", "Linear", "load", "match", "names", "pipeline_class", "roles"]
