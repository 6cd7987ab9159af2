"""The kernels of `delta_triton`; that module says what each is for. Nothing here waits for the device."""

import triton
import triton.language as tl

# Whatever the numbers are, a kernel is compiled once a dtype: no later step of a trainer may wait for a compiler.
_NUMBERS = ["num_elements", "num_words", "num_changes"]


@triton.jit
def _step(old, new, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """From one element to another, wrapping around in the element's own size, as the receiver's steps do."""
    if BITS <= 16:
        wide = new.to(tl.int32) - old.to(tl.int32)
        step = (wide << (32 - BITS)) >> (32 - BITS)
    else:
        step = new - old
    return step


@triton.jit
def _are_exceptions(old, new, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the step there, and the one back, takes more than a byte. One of a byte never does."""
    step = _step(old, new, BITS)
    return ((step < -128) | (step > 127)) & (BITS > 8), ((step <= -128) | (step > 128)) & (BITS > 8)


@triton.jit(do_not_specialize=_NUMBERS)
def mark(base, new, words, counts, num_elements, BITS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    tile, num_tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    places = tile * TILE + tl.arange(0, TILE)
    # Without a mask a load is 16 bytes wide; with one, of which the compiler knows nothing, it is one element.
    if (tile + 1) * TILE <= num_elements:
        lay, lies = tl.load(base + places), tl.load(new + places)
    else:
        inside = places < num_elements
        lay, lies = tl.load(base + places, mask=inside, other=0), tl.load(new + places, mask=inside, other=0)
    is_changed = (lay != lies).to(tl.int32)
    bits = tl.reshape(is_changed, (TILE // 32, 32)) << tl.arange(0, 32)[None, :]
    tl.store(words + tile * (TILE // 32) + tl.arange(0, TILE // 32), tl.sum(bits, 1))
    there, back = _are_exceptions(lay, lies, BITS)
    tl.store(counts + tile, tl.sum(is_changed, 0))
    tl.store(counts + num_tiles + tile, tl.sum(there.to(tl.int32), 0))
    tl.store(counts + 2 * num_tiles + tile, tl.sum(back.to(tl.int32), 0))


@triton.jit
def _count_bits(word):  # type: ignore[no-untyped-def]
    """Of 32-bit words; Hacker's Delight, 5-1."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=_NUMBERS)
def place(  # type: ignore[no-untyped-def]
    base, new, words, ends, positions, lay, lies, num_words, TILE_WORDS: tl.constexpr, WORDS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * WORDS
    number = first + tl.arange(0, WORDS)
    word = tl.load(words + number, mask=number < num_words, other=0)
    count = _count_bits(word)
    # `ends` counts the changes up to and with each tile.
    before = tl.load(ends + first // TILE_WORDS - 1, mask=first > 0, other=0)
    rank = before + tl.cumsum(count, 0) - count
    left = tl.max(count, 0)
    # Few bits are set, so each turn takes the lowest of every word.
    while left > 0:
        is_here = word != 0
        place = number * 32 + _count_bits((word & -word) - 1)
        tl.store(positions + rank, place, mask=is_here)
        tl.store(lay + rank, tl.load(base + place, mask=is_here), mask=is_here)
        tl.store(lies + rank, tl.load(new + place, mask=is_here), mask=is_here)
        word = word & (word - 1)
        rank += 1
        left -= 1


@triton.jit
def _skipped(positions, change, inside):  # type: ignore[no-untyped-def]
    """Elements between a change and the one before it."""
    here = tl.load(positions + change, mask=inside, other=0)
    return here - tl.load(positions + change - 1, mask=inside & (change > 0), other=-1) - 1


@triton.jit(do_not_specialize=_NUMBERS)
def measure(  # type: ignore[no-untyped-def]
    positions, lay, lies, measures, num_changes, SKIP: tl.constexpr, BITS: tl.constexpr, CHANGES: tl.constexpr
):
    change = tl.program_id(0).to(tl.int64) * CHANGES + tl.arange(0, CHANGES)
    inside = change < num_changes
    tl.store(measures + change, _skipped(positions, change, inside) // SKIP + 1, mask=inside)
    old, new = tl.load(lay + change, mask=inside, other=0), tl.load(lies + change, mask=inside, other=0)
    there, back = _are_exceptions(old, new, BITS)
    tl.store(measures + num_changes + change, there.to(tl.int64), mask=inside)
    tl.store(measures + 2 * num_changes + change, back.to(tl.int64), mask=inside)


@triton.jit
def _write_one(element, is_exception, place, change, inside, values, ordinals, low):  # type: ignore[no-untyped-def]
    tl.store(low + change, (element.to(tl.int64) & 255).to(tl.uint8), mask=inside)
    tl.store(values + place, element, mask=is_exception)
    tl.store(ordinals + place, change.to(tl.int32), mask=is_exception)


@triton.jit(
    do_not_specialize=_NUMBERS,
    do_not_specialize_on_alignment=["gaps", "values", "ordinals", "low", "values_back", "ordinals_back", "low_back"],
)
def write(  # type: ignore[no-untyped-def]
    positions,
    lay,
    lies,
    ends,
    num_gaps,
    gaps,
    values,
    ordinals,
    low,
    values_back,
    ordinals_back,
    low_back,
    num_changes,
    SKIP: tl.constexpr,
    BITS: tl.constexpr,
    BOTH: tl.constexpr,
    CHANGES: tl.constexpr,
):
    change = tl.program_id(0).to(tl.int64) * CHANGES + tl.arange(0, CHANGES)
    inside = change < num_changes
    end = tl.load(ends + change, mask=inside, other=1)
    tl.store(gaps + end - 1, (_skipped(positions, change, inside) % SKIP).to(tl.uint8), mask=inside)
    end_of_gaps, end_of_there = tl.load(ends + num_changes - 1), tl.load(ends + 2 * num_changes - 1)
    tl.store(num_gaps, end_of_gaps)
    old, new = tl.load(lay + change, mask=inside, other=0), tl.load(lies + change, mask=inside, other=0)
    there, back = _are_exceptions(old, new, BITS)
    place = tl.load(ends + num_changes + change, mask=inside, other=1) - 1 - end_of_gaps
    _write_one(new, inside & there, place, change, inside, values, ordinals, low)
    if BOTH:
        place = tl.load(ends + 2 * num_changes + change, mask=inside, other=1) - 1 - end_of_there
        _write_one(old, inside & back, place, change, inside, values_back, ordinals_back, low_back)
