"""Where a model's head is, and what enters it: the features that many methods work on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from equipoise.errors import ArgumentError, suggestion


def find_head(model: nn.Module, name: str | None = None) -> nn.Module:
    """The layer that turns features into predictions.

    ``name`` is a path as in ``model.named_modules()``. Without one: timm's ``get_classifier()``, else the last ``nn.Linear``
    in the order of definition. Raises ``ArgumentError`` if there is none, or the name does not exist.
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise ArgumentError(f"head = {name!r}: must name a module of the model. {suggestion(name, list(modules))}")
        return modules[name]
    classifier = getattr(model, "get_classifier", None)
    head = classifier() if callable(classifier) else None
    if isinstance(head, nn.Module):
        return head
    linear = [module for module in modules.values() if isinstance(module, nn.Linear)]
    if not linear:
        raise ArgumentError(
            "head = None: the model has no nn.Linear; name the layer that makes the predictions: head='path.to.layer'"
        )
    return linear[-1]


class FeatureTap:
    """Keeps what last entered the head, so that features cost no second forward pass and models need no change."""

    def __init__(self, head: nn.Module) -> None:
        self.features: Tensor | None = None
        # First among the head's hooks, so that a method which masks features there does not hide them from the others.
        self._handle = head.register_forward_pre_hook(self._keep, prepend=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.features = args[0]

    def take(self) -> Tensor | None:
        """The features of the last forward pass, once."""
        features, self.features = self.features, None
        return features

    def remove(self) -> None:
        self._handle.remove()
