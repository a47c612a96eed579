"""Every error that a user can cause, in one tree.

::

    OctavoError                 exit code 1
    ├── InputError              2: what was given is wrong; nothing was written
    │   ├── RecipeError            a recipe: unknown key, wrong type, rule that matches nothing
    │   ├── SourceError            a model: missing, gated, pickled, already quantized
    │   ├── FormatError            bytes: a truncated shard, an overlapping offset, a scale of NaN
    │   └── NumericsError          a weight that no scheme can hold: NaN, Inf
    ├── RefusedError            1: an artifact that is not proven; nothing was published
    ├── HubError                1: the Hub refuses or is out of reach; nothing was published
    ├── MachineError            3: this machine lacks something: memory, disk, a runtime
    └── BusyError               2: another run holds the same output

A message names the thing (tensor, ``file:line``), what is wrong in numbers, and what to do.
"""

from __future__ import annotations


class OctavoError(Exception):
    """Root of the tree. ``exit_code`` is what the command returns when the error reaches it."""

    exit_code = 1


class InputError(OctavoError):
    """What the user gave is wrong; nothing was written."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe that cannot be carried out; the message opens with ``file:line:column``."""


class SourceError(InputError):
    """A model that cannot be read as it is; the message names it and says how to get one that can."""


class FormatError(InputError):
    """Bytes that do not mean what their format says; the message names the file."""


class NumericsError(InputError):
    """A tensor whose values no eight-bit grid can hold (NaN or Inf); the message names it."""


class BusyError(InputError):
    """Another run is writing to the same output."""


class RefusedError(OctavoError):
    """An artifact that is not what its report proved, or was not proven; nothing was created anywhere."""


class HubError(OctavoError):
    """The Hub refuses, is out of reach, or has moved on; what was uploaded stays there for the next push, and nothing is visible."""


class MachineError(OctavoError):
    """This machine lacks something: memory, disk space, a runtime."""

    exit_code = 3
