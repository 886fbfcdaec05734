"""What a user is told when a program fails: the program's own errors as they are, those of the machinery in words."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_RAW = (IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError, NotImplementedError)
_OURS, _TORCH = ("pyro", "pplvi"), "torch"
_BETWEEN = {*_OURS, _TORCH, "contextlib", "functools"}  # the user and this package
_TABLE = "Trace Shapes:"


@contextmanager
def explained() -> Iterator[None]:
    """Let errors of the user's program through, with their type and traceback, and turn others into words.

    An error is the program's own if the innermost frame, but for torch's, is neither Pyro's nor this package's.
    Pyro raises errors anew with a table of shapes; such a copy is undone.

    >>> import pyro
    >>> with explained(), pyro.plate("data", 0):
    ...     pass
    Traceback (most recent call last):
    ValueError: a pyro.plate of size 0 was met: expected at least one element. Drop empty batches before the step.
    """
    try:
        yield
    except Exception as error:
        found = told(error)
        if found is error:
            raise
        raise found from found.__cause__


def warn(message: str) -> None:
    """Warn at the line of the user's own code that has led here, where Python shows a warning once.

    >>> with warnings.catch_warnings(record=True, action="always") as found:
    ...     warn("the data are few")
    >>> found[0].filename.endswith("errors.py")
    False
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def told(error: Exception) -> Exception:
    """What to raise in the place of an error; the error itself where it says what is wrong."""
    original = _original(error)
    if lacks_memory(original):
        why = str(original).strip().split("\n")[0] or "the system gave no more"
        return _because(MemoryError(_MEMORY.format(why)), error)
    frames = _frames(original)
    if not _is_ours(frames):
        return original
    told_already = isinstance(original, ValueError) and _room(frames[0]) == "pplvi"
    if not told_already and (text := explanation(original)):
        return _because(ValueError(text), error)
    if isinstance(original, _RAW):
        name = type(original).__name__
        where = f" at site {site['name']!r}" if (site := _message(frames)) else ""
        return _because(ValueError(f"the programs cannot be run{where}: {name}: {original}."), error)
    text = without_empty_tables(str(error))
    return error if text == str(error) else _because(type(original)(text), error)


_MEMORY = (
    "out of memory: {}. Expected programs whose draws fit into it together: run fewer at once (chunk_size= of a "
    "posterior, num_particles= of a loss), on less data, or in float32."
)


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had, on whatever device.

    >>> lacks_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"))
    True
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def is_own(error: Exception) -> bool:
    """Whether an error is one of the user's program."""
    return not _is_ours(_frames(_original(error)))


def explanation(error: Exception) -> str:
    """What a known error of Pyro or torch means and what to do, or nothing."""
    original = _original(error)
    texts = (explain(str(original), original, _frames(original)) for explain in _EXPLANATIONS)
    return next(filter(None, texts), "")


def without_empty_tables(text: str) -> str:
    """A message of Pyro without the tables of shapes that have no rows, which it adds once for every handler.

    >>> without_empty_tables("no\\nTrace Shapes:\\n Param Sites:\\nSample Sites:")
    'no'
    """
    first, *tables = text.split(_TABLE)
    filled = [t for t in tables if t.replace("Param Sites:", "").replace("Sample Sites:", "").strip()]
    return _TABLE.join([first.rstrip() + ("\n" if filled else ""), *(t.rstrip() + "\n" for t in filled)]).rstrip()


def _because(new: Exception, error: Exception) -> Exception:
    new.__cause__ = error
    return new


def _original(error: Exception) -> Exception:
    """The error that Pyro raised anew, with a table of shapes, at every handler that it went through."""
    while _TABLE in str(error) and isinstance(error.__cause__, Exception) and type(error.__cause__) is type(error):
        error = error.__cause__
    return error


def _frames(error: BaseException) -> list[FrameType]:
    """The frames that an error went through, innermost first."""
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    return found[::-1]


def _is_ours(frames: list[FrameType]) -> bool:
    rooms = map(_room, frames)
    return next((room for room in rooms if room != _TORCH), "") in _OURS


def _room(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).split(".")[0]


def _message(frames: list[FrameType]) -> dict[str, Any]:
    """The message of the site or parameter that was being handled, which Pyro's frames hold."""
    held = (frame.f_locals.get("msg") for frame in frames)
    return next((msg for msg in held if isinstance(msg, dict) and msg.get("name")), {})


def _improper(text: str, error: Exception, frames: list[FrameType]) -> str:
    if "ImproperUniform does not support sampling" not in text:
        return ""
    name = _message(frames).get("name", "name")
    return (
        f"site {name!r} has the improper prior ImproperUniform, which cannot be drawn from: expected a value to start "
        f"from. Pass init_loc_fn=init_to_value(values={{{name!r}: ...}}) to an automatic guide (lambda model: "
        "AutoNormal(model, init_loc_fn=...)), init_strategy= with the same to NUTS, or give the site a proper prior."
    )


def _no_draws(text: str, error: Exception, frames: list[FrameType]) -> str:
    if not isinstance(error, NotImplementedError) or not {"sample", "rsample"} & {f.f_code.co_name for f in frames[:2]}:
        return ""
    site = _message(frames)
    return (
        f"site {site.get('name', '')!r} has a {type(site.get('fn')).__name__}, which has a density and no draws: "
        "expected data for it (obs=), or a distribution with a sample() method. Give it one to draw predictions."
    )


_WITH_COORDINATES = {
    "Definite": "write a covariance as dist.LKJCholesky and scales",
    "Cholesky": "write it as dist.LKJCholesky and scales",
    "components": "give all components the same bounds",
}


def _no_coordinates(text: str, error: Exception, frames: list[FrameType]) -> str:
    if not isinstance(error, NotImplementedError) or "Cannot transform" not in text:
        return ""
    held = (f.f_locals.get(name) for f in frames for name in ("site", "node", "msg"))  # as Pyro's frames name it
    site = next((site for site in held if isinstance(site, dict) and site.get("name")), {})
    way = next((way for kind, way in _WITH_COORDINATES.items() if kind in text), "give the site to a guide of your own")
    return (
        f"site {site.get('name', 'unknown')!r}: {text.removesuffix('.')} to real numbers, which this guide needs. "
        f"Expected a support that has coordinates: {way}."
    )


def _whole_parameter(text: str, error: Exception, frames: list[FrameType]) -> str:
    if "floating point" not in text or "require gradients" not in text:
        return ""
    name = _message(frames).get("name", "")
    return (
        f"parameter {name!r} starts from a tensor of whole numbers, which has no gradient: expected floating point "
        "numbers. Write torch.tensor(1.0) for torch.tensor(1), or call .float()."
    )


def _whole_site(text: str, error: Exception, frames: list[FrameType]) -> str:
    if not re.search(r"not implemented for '(Long|Int|Short|Byte|Char|Bool)'", text):
        return ""
    site = _message(frames)
    found = _whole_arguments(site.get("fn"))
    return (
        f"site {site.get('name', '')!r} has a {type(site.get('fn')).__name__} whose parameters {found} are whole "
        "numbers: expected floating point numbers. Write torch.tensor(1.0) for torch.tensor(1), or call .float()."
    )


def _whole_arguments(fn: Any) -> list[str]:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    values = ((name, getattr(fn, name, None)) for name in getattr(fn, "arg_constraints", {}))
    return [name for name, value in values if isinstance(value, Tensor) and not value.is_floating_point()]


def _twice(text: str, error: Exception, frames: list[FrameType]) -> str:
    found = re.match(r"Multiple (\w+) sites named '(.*?)'", text)
    if found is None:
        return ""
    return (
        f"two {found[1]} sites are named {found[2]!r}: expected a name for each. In a loop put the index into the "
        'name, f"z_{i}".'
    )


def _beginning(text: str, error: Exception, frames: list[FrameType]) -> str:
    """Automatic guides keep ``a.b`` as attribute ``b`` of ``a``, which cannot be a parameter then."""
    pairs = _beginnings(frames) if isinstance(error, (AttributeError, TypeError, KeyError)) else []
    if not pairs:
        return ""
    return (
        f"this automatic guide cannot hold the parameters of the sites {pairs} ({text}), since the name of one is the "
        "beginning of the other's: expected names of which none goes on with a point after another. Rename one of "
        "them, or use a guide with one vector for all sites, such as AutoMultivariateNormal."
    )


def _beginnings(frames: list[FrameType]) -> list[tuple[str, str]]:
    """Sites of the automatic guide that was running whose names begin each other."""
    guides = (frame.f_locals.get("self") for frame in frames)
    traces = (getattr(guide, "prototype_trace", None) for guide in guides)
    names = list(getattr(next(filter(None, traces), None), "nodes", ()))
    return [(one, other) for one in names for other in names if other.startswith(f"{one}.")]


def _empty_plate(text: str, error: Exception, frames: list[FrameType]) -> str:
    if not isinstance(error, ZeroDivisionError):
        return ""
    return "a pyro.plate of size 0 was met: expected at least one element. Drop empty batches before the step."


def _no_latents(text: str, error: Exception, frames: list[FrameType]) -> str:
    if "found no latent variables" not in text:
        return ""
    return (
        f"{without_empty_tables(text)}: this guide needs at least one latent site, but the model has none. For maximum "
        "likelihood pass a guide without sites, such as `lambda *args: None`."
    )


def _signature(text: str, error: Exception, frames: list[FrameType]) -> str:
    if not isinstance(error, TypeError) or not re.search(r"\(\) (missing|takes|got (an|some|multiple))", text):
        return ""
    return (
        f"a program cannot be called with these arguments: {text}. Expected args= and kwargs= that fit the signature "
        "of the model, and a guide that takes the same."
    )


_EXPLANATIONS: tuple[Callable[[str, Exception, list[FrameType]], str], ...] = (
    _improper,
    _no_draws,
    _no_coordinates,
    _whole_parameter,
    _whole_site,
    _twice,
    _beginning,
    _empty_plate,
    _no_latents,
    _signature,
)
