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
