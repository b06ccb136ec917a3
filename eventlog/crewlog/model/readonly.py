"""Hold a mapping that a caller may read only, because it says what was recorded."""

from typing import NoReturn, TypeVar

T = TypeVar("T")


class ReadOnly(dict[str, T]):
    """A mapping that only reads; JSON and pickle take it for the dict that it is."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        message = "a worker is what was recorded: change it by reg.update(sid, labels=…, meta=…)"
        raise TypeError(message)

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, T]]]:
        """Pickle as what it holds."""
        return type(self), (dict(self),)
