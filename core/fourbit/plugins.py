"""The plugins: one pluggy manager for the life of the process, and the loading of what is installed.

The hooks that add things are historic: the registration of a plugin runs its own. An installed plugin is loaded whole
or not at all, and what it breaks stays its own.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from fourbit import codebooks, isolation, registry
from fourbit.backend import Backend
from fourbit.isolation import Fault
from fourbit.registry import VARIABLE, BackendInfo, NoBackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import pluggy

T = TypeVar("T")

BACKENDS = "fourbit.backends"
"""The entry points of plugins that are loaded when fourbit first needs a backend."""

MODELS = "fourbit.models"
"""The entry points of plugins that are loaded when a model folder is planned."""

_manager: pluggy.PluginManager | None = None
_source: ContextVar[str] = ContextVar("source", default="registered by the program")  # of the plugin being registered


def manager() -> pluggy.PluginManager:
    """The one manager, made at its first use: `import fourbit` imports no pluggy.

    Its `register(plugin)` runs the plugin's registering hooks at once, and lets through what they raise; what they
    added before that stays.
    """
    global _manager
    with registry.lock:
        if _manager is None:
            import pluggy

            from fourbit import hookspecs

            made = pluggy.PluginManager("fourbit")
            made.add_hookspecs(hookspecs)
            made.hook.fourbit_register_codebooks.call_historic(kwargs={"register": codebooks.register})
            made.hook.fourbit_register_backends.call_historic(kwargs={"register": _register_backend})
            _manager = made
        return _manager


def _register_backend(backend: Backend) -> None:
    registry.register(backend, source=_source.get())


# ---- loading ------------------------------------------------------------------------------------------


def load() -> None:
    """Load the plugins of backends; does nothing the second time.

    All or none: an interrupt passes through, and the next call loads them anew.
    """
    if registry.state.loaded:
        return
    with registry.lock:
        before, pending = registry.state, list(registry.pending)
        if before.loaded or before.loading:  # a plugin may call back into fourbit while it loads
            return
        try:
            registry.change(lambda now: {"loading": True})
            for ep in _backends():
                _load_backends(ep)
            registry.change(lambda now: {"loading": False, "loaded": True})
        finally:
            # no call in here: Python handles an interrupt at calls and loops, and this must not be torn
            if not registry.state.loaded:
                registry.state, registry.pending = before, pending
    # last, since a filter may turn a warning into an exception, which must not cost the plugins after it
    registry.give_pending()


codebooks.ask_plugins = load


def _load_backends(ep: EntryPoint) -> None:
    error = _load(ep)
    if error is not None:
        source, reason = _origin(ep), isolation.describe_error(error)
        trace = isolation.traceback_of(error)
        registry.remember(BackendInfo(ep.name, "failed", reason, source=source, traceback=trace))
        registry.warn(f"backend plugin {ep.name!r} from {source} failed to load and is ignored: {reason}")


def _load(ep: EntryPoint) -> BaseException | None:
    """Import one plugin and register it, whole or not at all; returns what it raised."""
    plugins, before, known, plugin = manager(), registry.state, codebooks.snapshot(), None
    token = _source.set(_origin(ep))
    try:
        plugin = ep.load()
        if plugins.is_registered(plugin):
            if before.loaded:
                return None
            plugins.unregister(plugin)  # by a load that was interrupted; or it has two names
        plugins.register(plugin, ep.name if plugins.get_plugin(ep.name) is None else str(ep.value))
        plugins.check_pending()
    except BaseException as error:  # a Rust extension's panic and SystemExit are no Exceptions
        if plugin is not None and plugins.is_registered(plugin):
            plugins.unregister(plugin)
        codebooks.restore(known)  # half a plugin is none
        registry.change(lambda now: {"entries": before.entries, "infos": before.infos})
        if isinstance(error, KeyboardInterrupt):
            raise
        return error
    finally:
        _source.reset(token)
    return None


def _backends() -> list[EntryPoint]:
    """The entry points of backends: fourbit's own first, as FOURBIT_BACKENDS restricts and orders them."""
    from importlib.metadata import entry_points

    def builtin_first(ep: EntryPoint) -> tuple[bool, str, str]:
        return (not _is_own(ep), ep.name, str(ep.value))

    found = sorted(entry_points(group=BACKENDS), key=builtin_first)
    allowed = registry.allowed_names()
    if allowed is None:
        return found
    for name in allowed:
        if name not in {ep.name for ep in found}:
            reason = f"{VARIABLE} names it, and it is not installed"
            registry.remember(BackendInfo(name, "failed", reason, source=VARIABLE))
            registry.warn(f"{VARIABLE} names {name!r}, which is not installed")
    for ep in found:
        if ep.name not in allowed:
            reason = f"not in {VARIABLE}={os.environ[VARIABLE]}"
            registry.remember(BackendInfo(ep.name, "disabled", reason, source=_origin(ep)))
    return [ep for name in allowed for ep in found if ep.name == name]


def _is_own(ep: EntryPoint) -> bool:
    """Whether an entry point is of fourbit's own distribution."""
    try:
        return isolation.call("its metadata", lambda: ep.dist is not None and ep.dist.name == "fourbit")
    except Fault:
        return False


def _origin(ep: EntryPoint) -> str:
    """The distribution and the module that a plugin comes from."""
    dist = getattr(ep, "dist", None)
    try:
        return isolation.call("its metadata", lambda: f"{dist.name} {dist.version} ({ep.value})" if dist else ep.value)
    except Fault:  # a distribution whose metadata is damaged
        return str(ep.value)


# ---- asking -------------------------------------------------------------------------------------------


def backends() -> list[BackendInfo]:
    """Every backend that was found, in the order in which they are asked, with its state and the reason."""
    load()
    now = registry.state
    order = {entry.name: i for i, entry in enumerate(now.entries)}
    return sorted(now.infos, key=lambda info: (order.get(info.name, len(order)), info.name))


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises NoBackendError, with the state of each, if it is not ready."""
    load()
    now = registry.state
    entry = now.entry(name)
    if entry is None:
        raise NoBackendError(f"backend {name!r} is not ready.\n{registry.listing(now)}")
    return entry.backend


def ask(hook: str, kind: type[T], **arguments: object) -> tuple[T | None, str]:
    """The first answer of a plugin of models that is a `kind`; if there is none, why.

    Each is asked by itself, within everyone's wrappers: what it raises is a reason to ask the next, and no more.
    """
    reasons = _load_models()
    found_impls = getattr(manager().hook, hook).get_hookimpls()
    answering = [impl for impl in found_impls if not (impl.wrapper or impl.hookwrapper)]
    for impl in reversed(answering):  # as pluggy calls them
        others = {other.plugin for other in answering} - {impl.plugin}
        try:
            found = manager().subset_hook_caller(hook, others)(**arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as a panic of a library in Rust
            reasons.append(_reason(impl.plugin_name, error))
            continue
        if isinstance(found, kind):
            return found, ""
        if found is not None:
            reasons.append(f"{impl.plugin_name} returned {type(found).__name__}, not a {kind.__name__}")
    return None, "; ".join(reasons)


def tell(hook: str, **arguments: object) -> None:
    """Call the hook of every plugin of models. What one raises is a warning, and the others are told all the same."""
    reasons = _load_models()
    told = getattr(manager().hook, hook).get_hookimpls()
    for impl in told:
        others = {other.plugin for other in told} - {impl.plugin}
        try:
            manager().subset_hook_caller(hook, others)(**arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            reasons.append(_reason(impl.plugin_name, error))
    for reason in reasons:
        registry.warn(f"{hook} failed: {reason}")


def _load_models() -> list[str]:
    """Load the plugins of models that are not loaded yet; returns why some cannot be."""
    load()
    with registry.lock:
        return [_reason(ep.name, error) for ep in _models() if (error := _load(ep)) is not None]


@cache
def _models() -> list[EntryPoint]:
    from importlib.metadata import entry_points

    # the last to be registered is the first to be asked
    return sorted(entry_points(group=MODELS), key=lambda ep: ep.name, reverse=True)


def _reason(name: str, error: BaseException) -> str:
    return f"{name}: {' '.join(isolation.describe_error(error).split())[:300]}"
