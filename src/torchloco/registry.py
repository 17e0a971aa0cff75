"""Transfer functions of one's own, and the modules that compute them."""

from __future__ import annotations

from torch import nn

from torchloco.transfers import Transfer, add_transfer

_modules: dict[type[nn.Module], Transfer] = {}


def register_transfer(transfer: Transfer, *modules: type[nn.Module]) -> Transfer:
    """Make a transfer function known by its name, and to discovery by the modules that compute it.

    Args:
        transfer: The transfer function; its name must be free.
        modules: Module classes whose forward is f. A supported layer whose output enters such a module gets it.

    Raises:
        TypeError: Not a `Transfer`, or a module that is not a class of `nn.Module`.
        ValueError: The name is taken.
    """
    for module in modules:
        if not (isinstance(module, type) and issubclass(module, nn.Module)):
            raise TypeError(f"register_transfer takes nn.Module classes after the transfer, got {module!r}")
    add_transfer(transfer)
    _modules.update(dict.fromkeys(modules, transfer))
    return transfer


def transfer_of_module(module: nn.Module) -> Transfer | None:
    """The transfer function registered for this module's class, if any."""
    return next((_modules[cls] for cls in type(module).__mro__ if cls in _modules), None)
