"""The last of several programs to finish goes on with what all of them have stored.

Each takes a ticket with one atomic addition, which adds no floats: the result does not depend on who comes last.
"""

# mypy: disable-error-code="no-untyped-def"

from sense_kernels._triton import tl, triton

__all__ = ["is_last"]


@triton.jit
def is_last(tickets, tile, programs, HIP: tl.constexpr):
    """Return whether this program is the last of a tile's to come here, and set the ticket back if it is.

    What any of them stored before it came here, the last one may load, past its first-level cache.
    """
    if HIP:
        # A barrier does not wait there for stores under way, and the release of the ticket covers one wavefront's.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1",
            "=v,v",
            [tl.arange(0, 64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    # The barrier puts this program's stores before its ticket, the ticket all programs' stores before the last's loads.
    tl.debug_barrier()
    last = tl.atomic_add(tickets + tile, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(tickets + tile, 0)
    return last
