"""Fuzz whatever reads bytes that a store holds: lines, snapshots, states, cursors, plans, tails.

By hand, with the extra `fuzz` (atheris, libFuzzer):

    python tests/fuzz/fuzz_readers.py -max_total_time=600

Each reader either returns what the bytes say or raises its own error; anything else is a fault.
"""

import sys

import atheris

with atheris.instrument_imports(include=["crewlog", "crewlog_compactor"]):
    from crewlog.errors import CrewlogError
    from crewlog.local import cursors, heads, leases, redo
    from crewlog.model import chain, codec
    from crewlog.model.codec import DocumentError, LineError
    from crewlog.model.snapshot import decode_snapshot
    from crewlog_compactor import plan


def one(data: bytes) -> None:
    """Try every reader on some bytes."""
    kind, rest = data[:1], data[1:]
    try:
        match kind:
            case b"l":
                codec.parse(rest)
            case b"s":
                decode_snapshot(rest)
            case b"t":
                chain.scan(rest, offset=0, seq=0, prev=None)
            case b"r":
                data, _, kept = rest.partition(b"\0\0")
                whole = redo.completed(data, 1, kept)
                good = chain.scan(data, offset=0, seq=0, prev=None).end
                assert whole[:good] == data[:good], "what held is gone"
            case b"p":
                plan.decode(rest, where="fuzz")
            case _:
                heads.decode_append_state(rest)
                heads.decode_durable_head(rest)
                leases.decode_beat(rest)
                cursors.decode_slots(rest)
    except (LineError, DocumentError, CrewlogError):
        return


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
