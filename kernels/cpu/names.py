"""What the bodies of loops take for granted: names that `compile` binds, so that bodies import without Numba.

Of the element type of a loop's tensors:
    element, size         a number as it lies in memory (a half as the int16 that holds its bits), its bytes
    real, real_size       the accumulation dtype, float32 or float64, its bytes
    widen, narrow         from one to the other, rounded to the nearest, ties to even
    read                  as widen, of what a loop over logits walks: z itself where options change the logits
    exp, log, exp_below   as `tl` has them; e^x for x <= 0 and 0 below 2^-126, NaN of NaN
    bounded, exp_of_bounded   its two steps: x where e^x is more than 0, below that a number whose power is 0; its power
    given_element, given_size, widen_given   the same of probabilities, which may have another element type
    where, largest_of     a choice of evaluated arguments; the larger of two, NaN of NaN
Of any:
    int32, int64, float32 kinds of numbers
    vector(address, n, kind), numbers(address, n, kind), record(address, kind)   what lies at an address: an array, a
                          tuple of a known length, a plan
    with_twos(tuple, places)   numbers of which some are known to be 2, by a set of bits
    transpose(source, stride, out, out_stride, kind)    8 rows of 8 numbers at an address, written as columns
    unrelated(address)    the same address, whose distance from others is not known
    call5, call8, call9   of a tuple: the address of a C function, and as many integers to call it with
"""

given_element = given_size = widen_given = None
element = size = real = real_size = widen = narrow = read = exp = log = where = largest_of = None
exp_below = bounded = exp_of_bounded = None
int32 = int64 = float32 = transpose = vector = numbers = record = with_twos = unrelated = call5 = call8 = call9 = None
