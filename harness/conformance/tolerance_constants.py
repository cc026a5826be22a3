"""Constants of the tolerances: the numbers that decide pass or fail, each with its reason. Imports no torch."""

from __future__ import annotations

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""dtype -> distance from 1 to the next larger number."""

# Largest error of a subject, as a multiple of the reference's own error in the same dtype. Two correct programs that sum in
# different orders have independent rounding errors of similar size, so with a factor of 1 half of them would fail.
NOISE_FACTOR = 2.0

# For a tensor of n numbers, NOISE_FACTOR is multiplied by (1 + 4 / n): two draws of many roundings have similar norms, but a
# single rounding is often many times another, especially where a sum cancels. Without this, 1.5 in 100,000 judgements of
# correct programs failed, each on a tensor of one number.
FEW_NUMBERS = 4.0

# Number of draws of rounding errors in addition to the first draw, which is the reference in the dtype. Each further draw
# moves the inputs within their last place. They are made only if the first draw does not explain the subject's error: it
# may happen to have almost no error. An error that few numbers decide (the gradient of four lambdas, or a model of 30 blocks
# that carries all roundings into one direction) is like a single normal number. In 16 % of all pairs of normal numbers, the
# first is at least 4 times as far from zero as the second. It is 4 times as far as each of eight others only once in 7,000
# cases.
PERTURBED_DRAWS = 7

# The same number where one layer or one Operation is judged, which is quick. With one token and rank 1, the error of the
# gradient of A is one number times x, so that n in FEW_NUMBERS is large but the error is like a single normal number. It is
# more than twice as far from zero as each of 8 others once in 121 cases, and as each of 32 others once in 6,500.
LAYER_DRAWS = 31

# Largest move of a number in a further draw, in units of the last place. One rounding moves a number by half a unit. The
# last REORDERED_DRAWS draws of a layer or an Operation in float32 and float64 also stand for sums in another order. If n
# terms cancel, the roundings of n partial sums lose sqrt(n / 2) times as much as one rounding of each term; a sum in 16
# lanes loses a quarter of that. So moves that are four times as far stand for 512 terms in 16 lanes.
ROUNDED_ULPS = 0.5
REORDERED_ULPS = 2.0
REORDERED_DRAWS = 3

# Torch may sum a tensor with gaps in memory one term after the other, in a single lane. So moves that are 16 times as far as
# one rounding stand for 512 such terms.
GAPPED_ULPS = 8.0

# No further draw is made after 1 + PERTURBED_DRAWS of them if the error is this many times as large as the allowance. With a
# factor of 2, a normal number is that far from zero, compared with eight others, once in a million cases.
HOPELESS = 4.0

# A walk in float16 that fails by more than this factor is not taken again with references that round at random: they excused
# a scaling that is 0.8 % off, which failed by a factor of 2.2.
UNLUCKY = 2.0

# Largest error of the reference in float32 from which its error in float64 is estimated. Rounding errors are proportional to
# eps only as long as they are small.
PROPORTIONAL = 2.0**-8

# Number of draws, the first included, for checks that cannot make one draw after the other until the subject passes.
DRAWS_AT_ONCE = 3

# Floor added to the allowance, in units of eps. Where the reference happens to be exact (one product, a copy), a factor
# times zero would demand bitwise equality, although the relative Frobenius error of one rounding is about 0.3 eps. In
# float32 and float64 every term of a sum is rounded too: n terms in sequence lose sqrt(n / 24) eps, sums in blocks a tenth
# of that. 8 eps allow for 1500 terms in sequence. In 16 bits, products are summed in float32, here and on every GPU. For
# float64 no wider reference exists: there, sums of 1000 terms had errors of 20 eps, and of 142 eps in the largest element.
NOISE_FLOOR_EPS = {"float64": 64.0, "float32": 8.0, "float16": 0.5, "bfloat16": 0.5}

# Factor on NOISE_FLOOR_EPS for the error of the largest element, relative to the root mean square. The largest of a few
# thousand normal numbers is about four times the root mean square, and its rounding error is larger by the same factor.
LARGEST_EPS = 4.0

# Further error of an element, in steps between subnormal numbers. Each of a few roundings may be wrong by one step.
SUBNORMAL_STEPS = 4.0

# Further factor on an error in float32 or float64, and on its floor, if a sum may have more terms than LONG_SUM: the weight
# has a longer side or, for gradients, the input more rows. The error of a sum one by one grows with the root of the number
# of terms, and that of a sum in blocks hardly does; the reference may sum in either way. For example,
# torch.linalg.vector_norm over 65,600 numbers with gaps in memory was off by 46 eps.
LONG_SUM, LONG_SUM_FACTOR = 1500, 8.0

# From this number of terms on, the factor grows with the number. The partial sums of positive numbers only grow, so that the
# roundings of a sum one by one drift: torch.linalg.vector_norm over a whole matrix of 32,761 numbers was off by 19 eps, over
# 81,796 by 61, and over 1,060,900 by 1,160.
VERY_LONG_SUM = 16_384


def long_sum_factor(terms: int) -> float:
    """Return the further factor on an error in float32 or float64, if a sum may have this number of terms."""
    return LONG_SUM_FACTOR * max(1.0, terms / VERY_LONG_SUM) if terms > LONG_SUM else 1.0


# Further factor for a layer under autocast. Programs multiply by the scaling in different places, and a small product in
# 16 bits has few digits. Two of 6,600 checks of a correct program failed without this factor, by up to 12 %.
AUTOCAST_FACTOR = 2.0

# Share of a tensor's elements, below which infinities are excused where a sum in another order may overflow.
LARGEST_OVERFLOW = 0.5

# Factor on the whole allowance of the largest element: the largest elements of two samples differ more than their norms do.
LARGEST_FACTOR = 2.0

# Largest share of elements that are not the correctly rounded number after one rounding, in addition to one element.
# Correct programs compute in float32 and round to 16 bits. A float32 error moves a number across the middle between two
# float16 numbers once in about 4,000 times, and between two bfloat16 numbers once in 30,000. One more rounding to 16 bits
# changes a quarter or more of all elements.
DOUBLE_ROUNDED_SHARE = 2.0**-6

# Distance from the middle between two 16-bit numbers at which both count as correctly rounded, in units of the last place of
# float32. In the first step of Adam, an update is +-1 except for eps, so a sum may be that near a middle in many elements.
MIDDLE_ULPS = 4.0

# Largest projection of an error on the correct result, in standard deviations of what rounding gives. Rounding goes up as
# often as down, so this projection shrinks with the root of the number of independent roundings. The projection of a wrong
# factor does not shrink. In a low-rank product, only sqrt(n) of n roundings may be independent.
BIAS_SIGMAS = 4.0

# An 8-bit code of a moment may be the neighbouring code if the moment is within this many float32 units of the middle of the
# two. A moment takes four roundings (two products, a sum, a division), which correct programs order and fuse differently.
CODE_TIE_EPS = 4.0

# Means over random draws may be off by this many standard errors: about one false alarm in some hundred thousand.
INITIAL_SIGMAS = 5.0
DROPOUT_SIGMAS = 5.0

# The same for the mean over 4 randomised SVDs, compared with 32 of the reference, whose distribution is skewed. In 10 x
# 20,000 simulated comparisons none was off by more than 8 standard errors, and 51 by more than 5. Two iterations in place
# of four are off by 15 to 20.
RANDOMISED_SIGMAS = 8.0

# A projection shows whether a row of an update is in the output. Its error is the rounding of one element, whose root mean
# square is below half an eps of the output. A row is judged if its norm is at least this many eps. The decision lies at half
# the norm, so at six times this error.
VISIBLE_EPS = 6.0

# Largest distance between two starts of one seed, as a share of their norm. Rounding moves the factors of an SVD by less
# than a hundredth of this share, and another random sketch of the same weight by more than ten times as much.
RANDOM_SHARE = 2.0**-6

# Minus log2 of the probability that a correct mask treats all tokens alike that the check `dropout` observes.
DROPOUT_SURE_BITS = 30.0
# Least share of these bits in the tokens that are left if rounding hides the mask in some. The probability is then 1e-6.
DROPOUT_SURE_SHARE = 2 / 3

# A tensor is not judged if the reference in the subject's dtype may itself be off by more than this share of the value.
CEILING = 0.5

# Largest error through a whole model, as a multiple of the reference's own: over the 72 gradients of a six-layer encoder in
# 16 bits, the errors of correct programs were up to 3.9 times as large in one tensor, and 1.5 times in the median.
CARRIED_FACTOR = 4.0

# Largest error of the losses of a training run, as a multiple of the reference's largest error so far. It exceeds the factor
# of one operation because both runs are single draws of a noise that each optimizer step carries on and amplifies.
TRAJECTORY_FACTOR = 4.0

# Check -> its usual factor, if this is not NOISE_FACTOR.
USUAL_FACTORS = {
    "logits": CARRIED_FACTOR, "model": CARRIED_FACTOR, "trajectory": TRAJECTORY_FACTOR, "walk": TRAJECTORY_FACTOR,
}  # fmt: skip

# Floor added to the allowance of losses, in units of eps times the largest loss so far: at the first steps the reference may
# happen to round to the exact value, and a factor times zero would then demand bitwise equality.
TRAJECTORY_FLOOR_EPS = 8.0

# An adapter on a server is too weak to be judged if its scaling could be wrong by more than this share without a finding.
# A server that ignores use_rslora at rank 4 halves the scaling: no published mistake of servers is smaller.
SERVED_WEAK = 0.5

# Smallest learning rate of a check, in units of eps: a step then moves a weight of 1 by about 10 units in its last place.
LEARNING_RATE_EPS = 32.0

# The reference defines the noise, so the noise cannot judge the reference. The reference's distance from float64 may grow
# by this many eps per step, times the largest loss so far: rounding errors accumulate, but a wrong gradient departs faster.
REFERENCE_GROWTH_EPS = 16.0

# Share of the gradient of a causal model's first outputs that may reach a later token. A mask gives exactly zero; a causal
# convolution by Fourier transforms gives a few eps of float32. One fresh layer of a BERT of 8 features gives 5e-4.
FUTURE_TOKEN_LEAKAGE = 2.0**-16

# Largest relative difference between the prediction of `fit` and the ledger of a real Cell. Both count the same tensors.
# Only small tensors, such as a packed weight's table of 16 levels, are not predicted; they matter only in small layers.
FOOTPRINT_LEDGER = 0.03

# A report ignores differences from the prediction below this number of bytes; tables of 16 levels and counters cause them.
FOOTPRINT_SHOWN_B = 2**20

# Largest relative difference between activations by formula and the storages that autograd saves for the references. The
# formula omits the tables of rotary positions: 0.5 % in a Llama of 128 features and 3 blocks, less in larger models.
FOOTPRINT_ACTIVATIONS = 0.02
