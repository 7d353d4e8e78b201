"""Networks by name: the paper's own, torchvision's, timm's, and any factory that can be imported."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import BackendError, ModelError
from .mobilenet import mobilenet_v1, mobilenet_v2
from .resnet import resnet50
from .resnet_cifar import resnet20, resnet32, resnet44, resnet56, resnet110
from .vgg import vgg16, vgg19

_FACTORIES: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        vgg16,
        vgg19,
        resnet20,
        resnet32,
        resnet44,
        resnet56,
        resnet110,
        resnet50,
        mobilenet_v1,
        mobilenet_v2,
    )
}


def names() -> tuple[str, ...]:
    """Names of the paper's networks, as `get` takes them."""
    return tuple(_FACTORIES)


def get(name: str, /, **kwargs: Any) -> nn.Module:
    """Builds a randomly initialised network by name.

    Args:
        name: One of `names()`; or `"torchvision:<builder>"`, such as `"torchvision:resnet18"`; or `"timm:<name>"`, such as
            `"timm:resnet26d"`; or `"package.module:factory"`, where the factory is any callable of that module that returns an
            `nn.Module`.
        **kwargs: Passed to the factory, such as `num_classes=10` or `expansion=1.25`.

    Returns:
        The network, in training mode.

    Raises:
        ModelError: The name is unknown (the message lists the closest ones), the factory does not take `kwargs`, or it returned
            something else than a module.
        BackendError: torchvision or timm is asked for and not installed.

    Example:
        >>> from pfs_fast import models
        >>> models.get("resnet20", num_classes=100).fc.out_features
        100
    """
    if not isinstance(name, str):
        raise ModelError(
            f"models.get: name must be a string, got {type(name).__name__}; pass a module itself where one is at hand"
        )
    prefix, colon, attribute = name.partition(":")
    if not colon:
        factory = _FACTORIES.get(name)
        if factory is None:
            repair = 'or "torchvision:<builder>" or "timm:<name>" or "package.module:factory"'
            raise ModelError(
                f"models.get: name must be one of {', '.join(names())}, {repair}, got {name!r}{_closest(name, names())}"
            )
    elif prefix == "torchvision":
        factory = _torchvision_factory(name, attribute)
        no_weights = {"weights", "weights_backbone"} & inspect.signature(factory).parameters.keys()
        kwargs = {**dict.fromkeys(no_weights), **kwargs}
    elif prefix == "timm":
        factory = _timm_factory(name, attribute)
    else:
        factory = _imported_factory(name, prefix, attribute)
    return _build(name, factory, kwargs)


def is_listed(name: str) -> bool:
    """Whether a name is that of a network in the list of this package, torchvision or timm, and not of any other function."""
    prefix, colon, attribute = name.partition(":")
    if not colon:
        return name in _FACTORIES
    listing = {"torchvision": _torchvision_names, "timm": _timm_names}.get(prefix)
    return listing is not None and attribute in listing(name)


def _build(name: str, factory: Callable[..., Any], kwargs: dict[str, Any]) -> nn.Module:
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ModelError(
            f"models.get: keyword arguments must be ones that {name!r} takes, got {kwargs}; {error}"
        ) from error
    except ValueError:
        pass  # a callable written in C has no signature to look at; calling it will tell
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"models.get: {name!r} must return a torch.nn.Module, got {type(model).__name__}; "
            "name a class or function that builds the network"
        )
    return model


def _torchvision_names(name: str) -> list[str]:
    return _package(name, "torchvision").models.list_models()


def _timm_names(name: str) -> list[str]:
    return _package(name, "timm").list_models()


def _package(name: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BackendError(
            f"models.get: {name!r} needs the package {package}, which cannot be imported ({error}); pip install {package}"
        ) from error


def _torchvision_factory(name: str, attribute: str) -> Callable[..., nn.Module]:
    builders = _torchvision_names(name)
    if attribute not in builders:
        raise ModelError(
            f"models.get: name must be a network of torchvision.models, got {name!r}"
            f"{_closest(attribute, builders, 'torchvision:')}"
        )
    return _package(name, "torchvision").models.get_model_builder(attribute)


def _timm_factory(name: str, attribute: str) -> Callable[..., nn.Module]:
    """A network of timm's list without weights, or a function of timm itself."""
    known = _timm_names(name)
    timm = _package(name, "timm")
    if attribute in known:
        return functools.partial(timm.create_model, attribute)
    if not callable(getattr(timm, attribute, None)):
        raise ModelError(
            f"models.get: name must be a network of timm.list_models(), got {name!r}{_closest(attribute, known, 'timm:')}"
        )
    return getattr(timm, attribute)


def _imported_factory(name: str, module_name: str, attribute: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ModelError(
            f'models.get: name must be "package.module:factory" of an importable module, got {name!r} ({error}); '
            "check the spelling and PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ModelError(
            f"models.get: name must end in a callable of {module_name}, got {name!r}"
            f"{_closest(attribute, known, module_name + ':')}"
        )
    return factory


def _closest(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """The end of a message: the candidates nearest to `word`."""
    matches = difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.5)
    if not matches:
        return "; see models.names()" if not prefix else "; no name there is close to it"
    return f"; did you mean {' or '.join(prefix + match for match in matches)}?"
