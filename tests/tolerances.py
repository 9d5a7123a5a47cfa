"""Every numeric tolerance of the tests, with its reason."""

NORMALIZED_PIXEL_ATOL = 1e-5
"""Normalized pixels: `pixel * scale + shift` against `(pixel / 255 - mean) / std`, both in float32, where
values reach 3 and one uint8 level is 0.017."""

BILINEAR_LEVELS = 1.0
"""Bilinear sampling in uint8 levels against torch's in float: Pillow truncates to a level."""

ENGINE_FP32_ATOL = 1e-4
"""Logits of the tiny fp32 model (about 5) against NumPy, both float32: the engines add in another order."""

ENGINE_INT8_ATOL = 5e-3
"""Logits of the tiny int8 model: an engine may round a value that lies on a step's edge the other way. One
pixel of 144 by one step (4/255), times a head weight of about 3, is 3e-4; allow a dozen of them."""

SAME_NETWORK_RTOL = 1e-5
"""Logits of two implementations of one network on the same weights, relative to the largest: the same float32
operations, but a sum of products may be taken in another order."""

REFERENCE_TRANSFORM_ATOL = 1e-5
"""Network input from `pipeline.preprocess` against the library's own transform: the same pixels, normalized
in float32 in another order of operations."""

FOLDED_RELATIVE = 2e-5
"""A folded tiny graph against the original, both in ONNX's reference evaluator in float32: largest error over
largest output. Weights are rounded to float32 once (6e-8); a few hundred products of size one sum it up."""

EXPORTED_RELATIVE = 1e-4
"""Logits of a small network in PyTorch against its folded graph in OpenVINO, largest error over largest
logit: two float32 libraries over ten layers differ by 1e-6 to 1e-5."""

CALIBRATED_INT8_SQNR_DB = 37.0
"""Logits of the tiny calibrated model, int8 against fp32, in dB of what tells images apart. The four methods reach
39.3 to 39.7 (OpenVINO, VNNI or better); one range of four ten times too wide leaves 35.5 at most."""

SAME_SUMS_ATOL = 1e-4
"""Float32 sums of up to a hundred products of size one, taken in another order."""

ADAPTIVE_GAIN_DB = 1.0
"""What the default corrections gain on the logits of the tiny network, on other images."""

EQUALIZATION_GAIN_DB = 1.0
"""The same for equalization alone, of a network whose channels differ by a factor of ten."""

LOGITS_OF_GRIDS_DB = 1.0
"""SQNR of eight images' logits from weights on their grids in float32, against the int8 graph in another engine, with its
int32 biases and, for TensorRT, half precision: a value on the edge between two steps may be rounded the other way."""

SIMULATED_MEASUREMENTS = 1000
"""Draws of a simulated validation; the share of them is then known to ±0.013 (one standard deviation)."""

PLANNED_POWER_ATOL = 0.05
"""Share of simulated validations that show what was planned for, against the planned 0.8. The plan is a normal
approximation: 0.806 to 0.816 over five cases in 1500 draws each; three standard deviations of the draws above
that."""

FALSE_ALARM_ATOL = 0.015
"""Share of 2000 simulated families with a false alarm, against 0.05: three standard deviations (0.005)."""

AVERAGED_SOFTMAX_ATOL = 1e-12
"""Averaged probabilities against the same average in another order, both float64."""

CUDA_PREPROCESS_LEVELS = 0
"""Pixels of the CUDA kernels, compiled for the CPU, against `pipeline.preprocess`, in uint8 levels: the same integers
and the same doubles as Pillow's. (What is required of the kernel is 1.)"""

CUDA_FRAME_LEVELS = 1
"""A camera's frame in an engine's input on a GPU, whose doubles round as the CPU's do but for what NVRTC reorders: what
is required of the kernel."""

YUV_ROUNDING_LEVELS = 2.5
"""RGB back from limited-range YUV, in uint8 levels: luma is rounded to half of 1/219 (0.6 levels), chroma to half of
1/224 times at most 2.1 (1.1 levels), the result to 0.5. The other matrix is wrong by 20 levels and more."""
TENSORRT_INT8_SQNR_DB = 30.0
"""Logits of the tiny calibrated model in TensorRT's int8 form against fp32, in dB of what tells images apart.
Symmetric int8 has half the levels behind a Relu that uint8 has, 6 dB less than `CALIBRATED_INT8_SQNR_DB` allows;
measured are 34.6 dB, and one range ten times too wide leaves 25.5 at most."""

HALF_SQNR_DB = {"float16": 55.0, "bfloat16": 35.0}
"""Logits of a tiny model with constants rounded to half precision, against fp32. Rounding by 2^-12 (2^-9) on the average
is 72 (54) dB a layer, a handful of layers and a sum over fewer than a hundred products leave 60 to 70 (40 to 50)."""

ENGINE_TF32_ATOL = 5e-2
"""Logits of the tiny fp32 model (about 5) from a GPU, which multiplies in TF32 unless told otherwise: 10 bits of
mantissa are 5e-4 of each product, over three channels and then eight."""

LAYER_NOISE_DB = 0.7
"""The noise of one layer from its input's histogram and its weight against the noise that is measured. 2,000 inputs
settle the measured one to 0.2 dB, and the product of both errors, left out, is 40 dB lower; the rest is clipping,
whose error grows with the value and so is not as independent of it as rounding."""

SENSITIVITY_DB = 1.5
"""Logits SQNR of one layer in int8: told apart to first order in float32, against the real int8 graph. The kernels
round a tensor that a pool reads as well, and the noise of a coarse layer has second-order terms; a wrong layer is off by 10 dB
and more."""

SHARED_PATTERNS_RTOL = 0.1
"""Energies of 100 layers that share 31 patterns, over the largest: 64 images x 31 sums, each with crossing terms of random
sign over 200 logits."""

WRONG_EARLY_STOPS = 0.01
"""Share of `SIMULATED_MEASUREMENTS` judgements at the limit itself that are stopped wrongly, on a side. At most 0.05 are
spent, and 0 to 0.002 measured, since the images seen are part of all; looks that each spent 0.1 would exceed this."""

ATTRIBUTED_MARGIN_RTOL = 0.25
"""Between how far int8 moved the margins of flipped images and the sum of the layers' first-order parts: what is left
is of second order in noises of a tenth of the signal and more."""

FAIR_SHARE_RTOL = 0.25
"""How far a source's share of 320 answers may be from an equal one: a thread that the system keeps waiting misses turns,
and a feed that is there first has some to itself. Without turns the flooding feed has three in four. The camera app's own
promise is a tenth, of a whole run (benchmarks/stream_many.py)."""

SAME_AVERAGE_ATOL = 1e-9
"""A running average in [0, 1] by one step or by thirty: float64 (1e-16 a step), and times rounded to a nanosecond, 1e-9
of a second over a time constant of 0.05 s, in the sum of steps once."""

UNIT_EXPOSURE = 2.0
"""What `systemd-analyze security` may find of the service's unit at most, of 10: systemd 252 finds 1.6 without devices and
1.8 with them, and another version may weigh a line by 0.2 more."""

JPEG_LEVELS = 0.6
"""A test picture of the page through JPEG at quality 80, mean absolute error in uint8 levels: 0.12 measured, at the
edges of its stripe; the picture before or after it, whose stripe stands elsewhere, is 1.5 off."""

TIPPED_STEP_ATOL = 2e-3
"""Means over 64 positions of outputs computed from quantized inputs: a value on the edge between two steps may be rounded
the other way by another engine. One step of 0.008 times a weight of about 1 is 1.2e-4 of the mean, twice its error of
about 2 is 5e-4 of the mean square; allow a few."""

PLANAR_MEAN_LEVELS = 0.6
"""Network pixels of a picture that was resized as planes of Y, U and V, against the same planes turned into BGR and
resized as Pillow does, mean over the picture in levels. The two round to bytes at other places (0.3 levels each time), and
chroma is interpolated here and repeated there: 0.2 to 0.4 were measured. The wrong matrix is 1.0 off and more."""

PLANAR_MAX_LEVELS = 8
"""The same, at the worst pixel: an edge between colours, where chroma is interpolated over two pixels. 5 were measured."""

PLANAR_FILM_MEAN_LEVELS = 0.6
"""Network pixels of a decoded film, resized as planes, against FFmpeg's careful conversion of the whole picture and Pillow's
resize, mean over the picture in levels: 0.35 to 0.44 were measured, here and on a noisy test pattern of 1080p, without a bias.
FFmpeg's quick conversion, which cuts fractions off and repeats chroma, is 1.25 off, 1.1 of it to the dark."""

PLANAR_FILM_MAX_LEVELS = 48
"""The same, at the worst pixel: on the hard edge of a saturated disk. 25 were measured (38 on the test pattern)."""

ONE_ARENA_GROWTH_MB = 1.0
"""Private memory over 40 threads, one after the other, that each read a bundle with a file of 4 MB: 0.1 measured with one
arena; without, each leaves a megabyte in another one of sixteen, 3.7 to 7.5."""

FREED_PAGES_LEFT_MB = 3.0
"""Of 57 MB in small blocks, how much stays in the process when they are given back: 0.1 measured, pages that are still in
use in part. Without it, all: the last block lies above them."""

LOOKED_AT_BY_THE_COLLECTOR = 30_000
"""Objects that a full collection of `edgefold stream` passes through, after five reloads and two hundred clients: 6,000
measured, 92,000 where those of the start-up are not set aside."""

GPU_TRAINING_RTOL = 1e-2
"""Losses and weights after some twenty steps on a GPU, against a CPU: TF32 convolutions keep 11 bits (5e-4), and every
step goes on from the last one's differences."""
