"""The hybrids of distillation and adaptive weights (2512.01054, section 5.2), all data-free, by one name."""

from typing import Any, Literal

from unlearn_runner.methods.distillation.mixed_labels import MixedLabels
from unlearn_runner.methods.distillation.multi_class import MultiClass
from unlearn_runner.methods.distillation.student import Student
from unlearn_runner.methods.method import Method, Setting

VARIANTS: dict[str, tuple[type[Method], tuple[str, ...]]] = {
    "multi_class": (MultiClass, ("forget_samples", "forget_weight", "beta", "prior", "target", "num_draws")),
    "siss_sfd_labels": (MixedLabels, ("override", "forget_weight", "lambd")),
    "siss_sfd_student": (Student, ("generator_update", "override", "max_steps", "distil_share", "eta", "lambd")),
}
FURTHER_OPTIONS = {
    "hybrid": (
        "unlearn_runner.methods.distillation.multi_class.MultiClass",
        "unlearn_runner.methods.distillation.mixed_labels.MixedLabels",
        "unlearn_runner.methods.distillation.student.Student",
    )
}


def hybrid(
    setting: Setting, variant: Literal["multi_class", "siss_sfd_labels", "siss_sfd_student"], **options: Any
) -> Method:
    """The method of `method.variant`, given those of the options that it has; `options` are those of all variants."""
    cls, own = VARIANTS[variant]
    others = {name for _, names in VARIANTS.values() for name in names} - set(own)
    return cls(setting, **{name: value for name, value in options.items() if name not in others})
