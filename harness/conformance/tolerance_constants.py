"""Tolerance constants: the numbers that decide pass or fail, each with its reason. No torch."""

from __future__ import annotations

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next number of each dtype."""

# A subject in some dtype may err this many times what the reference itself errs in that dtype. Two correct programs
# that sum in another order differ from float64 by independent rounding of like size: a factor of 1 is a coin toss.
NOISE_FACTOR = 2.0

# Of a tensor of n numbers that becomes (1 + 4 / n) times as much: the norms of two draws of many roundings are alike, but of
# two single roundings one is often many times the other, above all where a sum cancelled. 1.5 in 100,000 judgements of
# correct programs failed without it, each of them of one number.
FEW_NUMBERS = 4.0

# Besides the reference in the dtype, so many draws of its inputs moved within their last place: one draw of rounding alone
# may by luck be almost none, and a correct program would then fail.
PERTURBED_DRAWS = 2

# Added to that, times eps. Where the reference happens to be exact (one product, a copy), a factor times zero would demand
# bitwise equality: the relative Frobenius error of one rounding is about 0.3 eps. In float32 and float64 sums are rounded
# at every term besides: of n terms, one after the other, by sqrt(n / 24) eps, where a library that sums in blocks loses a
# tenth of it. 8 eps are 1500 terms. In 16 bits products are summed in float32, here and on every GPU. The float64 reference
# has no wider one beside it that would show its own noise: 20 eps were seen of 1000 terms, and 142 in the largest element.
NOISE_FLOOR_EPS = {"float64": 64.0, "float32": 8.0, "float16": 0.5, "bfloat16": 0.5}

# The same for the largest element relative to the root mean square: of a few thousand normal numbers the largest is about
# four times the root mean square, and its rounding as much larger.
LARGEST_EPS = 4.0

# And the largest of two such samples differ more than their norms do.
LARGEST_FACTOR = 2.0

# Rounding is as often up as down, so what of the truth it takes away shrinks with the root of the number of independent
# roundings; a wrong factor does not. In a low-rank product as few as the fourth root's square are independent.
BIAS_SIGMAS = 4.0

# An 8-bit code of a moment may be its neighbour's where the moment is so many float32 units from the middle of the two: two
# products, a sum and a division are four roundings, and correct programs order and fuse them differently.
CODE_TIE_EPS = 4.0

# Means over random draws may be off by this many standard errors: one false alarm in some hundred thousand.
INITIAL_SIGMAS = 5.0
DROPOUT_SIGMAS = 5.0

# So many tokens are looked at that a right mask would treat all of them alike once in two to this power.
DROPOUT_SURE_BITS = 30.0

# Where the reference in the subject's dtype may itself be off by more than this share of the value, nothing can be judged.
CEILING = 0.5

# Through a whole model, as a multiple of the reference's own: over the 72 gradients of a six-layer encoder in 16 bits,
# correct programs were seen to err up to 3.9 times as much in one tensor, and 1.5 times in the median.
CARRIED_FACTOR = 4.0

# Further draws of that noise, made where the first does not explain the subject's. In a model of 30 blocks with large random
# VeRA vectors the gradients of one correct float32 run erred 5 to 15 times as much as those of another: such a model has one
# direction into which it carries all roundings, and of two normal numbers one is 4 times as far from zero as the other in
# 16 % of all pairs. That it is 4 times as far as each of eight others happens once in 7,000.
CARRIED_DRAWS = 7

# The same for the losses of a training run, judged against the reference's largest error so far. Wider than one
# operation's factor: both runs are single draws of a noise that each optimizer step carries on and amplifies.
TRAJECTORY_FACTOR = 4.0

# Added to that, times eps and the largest loss so far: at the first steps the reference may happen to round to the
# exact value, and a factor times zero would then demand bitwise equality.
TRAJECTORY_FLOOR_EPS = 8.0

# The reference cannot be judged by the noise that it defines. Its own distance from float64 may grow by this many eps
# per step, times the largest loss so far: rounding accumulates, a wrong gradient departs much faster.
REFERENCE_GROWTH_EPS = 16.0

# Of the gradient of a causal model's first outputs this share may reach a later token. A mask leaves exactly nothing; a
# causal convolution by Fourier transforms leaves some eps of float32. One fresh layer of a BERT of 8 features gives 5e-4.
FORESIGHT = 2.0**-16

# How far the prediction of `fit` may be from the ledger of a real Cell. Both count the same tensors, so most is exact; a
# packed weight's table of 16 levels and its like are not predicted, and weigh only in small layers.
FOOTPRINT_LEDGER = 0.03

# Bytes: a report does not warn of a smaller difference from the prediction, as tables of 16 levels and counters make it.
FOOTPRINT_SHOWN_B = 2**20

# Activations by formula against the storages that autograd saves for the references: what is not in the formula (the sines
# and cosines of positions) was half a per cent of them in a Llama of 128 features and 3 blocks, and is less in a larger one.
FOOTPRINT_ACTIVATIONS = 0.02
