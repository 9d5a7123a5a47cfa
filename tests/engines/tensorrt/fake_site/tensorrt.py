"""A stand-in for ``tensorrt`` where none can be installed: the names that 10.3, 10.13 and 11.4 have.

Which names each version has was read out of its published bindings (test_api.py lists them). As those
do, a class refuses attributes it does not have. ``EDGEFOLD_FAKE_TENSORRT`` is JSON: ``version``, and how
to misbehave. A plan is "ftrt" and, as JSON, everything the builder was told.
"""

import enum
import json
import os
import signal

_WANTED = json.loads(os.environ.get("EDGEFOLD_FAKE_TENSORRT", "{}"))
__version__ = _WANTED.get("version", "10.3.0")
_V = tuple(int(part) for part in __version__.split("."))


def _enum(name, *names):
    return enum.IntEnum(name, [(value, index) for index, value in enumerate(names)])


NetworkDefinitionCreationFlag = _enum(
    "NetworkDefinitionCreationFlag", *(() if _V >= (11,) else ("EXPLICIT_BATCH",)), "STRONGLY_TYPED"
)
BuilderFlag = _enum(
    "BuilderFlag",
    *(() if _V >= (11,) else ("FP16", "INT8", "BF16")),
    "TF32",
    "VERSION_COMPATIBLE",
    "EXCLUDE_LEAN_RUNTIME",
)
HardwareCompatibilityLevel = _enum(
    "HardwareCompatibilityLevel",
    "NONE",
    "AMPERE_PLUS",
    *(("SAME_COMPUTE_CAPABILITY",) if _V >= (10, 13) else ()),
)
if _V >= (10, 13):
    TilingOptimizationLevel = _enum("TilingOptimizationLevel", "NONE", "FAST", "MODERATE", "FULL")
MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE", "DLA_MANAGED_SRAM")
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE", "JSON")
LayerType = _enum("LayerType", "CONVOLUTION", "QUANTIZE", "DEQUANTIZE")
DataType = _enum("DataType", "FLOAT", "HALF", "BF16", "INT8")
_Code = _enum("ErrorCode", "SUCCESS", "INVALID_NODE")


class ILogger:
    Severity = _enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity


class IProgressMonitor:
    pass


class ITimingCache:
    def __init__(self, entries):
        self.entries = entries

    def combine(self, input_cache, ignore_mismatch):
        assert ignore_mismatch is False
        self.entries |= input_cache.entries
        return True

    def serialize(self):
        return json.dumps(sorted(self.entries)).encode()


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        self.shapes[input] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    __slots__ = (
        "_cache",
        "_flags",
        "_pools",
        "_profiles",
        "builder_optimization_level",
        "hardware_compatibility_level",
        "profiling_verbosity",
        "progress_monitor",
        *(("tiling_optimization_level",) if _V >= (10, 13) else ()),
    )

    def __init__(self):
        self._flags, self._pools, self._profiles, self._cache = [], {}, [], None
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def set_flag(self, flag):
        self._flags.append(BuilderFlag(flag).name)

    def set_memory_pool_limit(self, pool, size):
        self._pools[MemoryPoolType(pool).name] = size

    def add_optimization_profile(self, profile):
        self._profiles.append(profile.shapes)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized):
        try:
            return ITimingCache(set(json.loads(serialized)) if serialized else set())
        except ValueError:
            return None

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class _Tensor:
    def __init__(self, name, shape, dtype):
        self.name, self.shape, self.dtype = name, shape, dtype


class _Layer:
    num_outputs = 1

    def __init__(self, kind, dtype):
        self.type, self._dtype = kind, dtype

    def get_output(self, index):
        return _Tensor("t", (1,), self._dtype)


class INetworkDefinition:
    def __init__(self, flags):
        self.strongly_typed = bool(flags >> int(NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1)
        self.onnx_bytes = None

    num_inputs = 1
    layers = (
        _Layer(LayerType.QUANTIZE, DataType.INT8),
        _Layer(LayerType.CONVOLUTION, DataType.HALF),
    )
    num_layers = len(layers)

    def get_input(self, index):
        return _Tensor("x", tuple(_WANTED.get("input_shape", (-1, 3, 8, 8))), DataType.FLOAT)

    def get_layer(self, index):
        return self.layers[index]


class _ParserError:
    def code(self):
        return _Code.INVALID_NODE

    def desc(self):
        return "Assertion failed: the graph is refused as strongly typed"

    def node(self):
        return 0

    def node_name(self):
        return "node"

    def node_operator(self):
        return "Relu"

    def local_function_stack(self):
        return []


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self._network = network

    def parse(self, model):
        self._network.onnx_bytes = bytes(model)
        return not (_WANTED.get("refuse_strong") and self._network.strongly_typed)

    def get_error(self, index):
        return _ParserError()


class IHostMemory(bytes):
    pass


class Builder:
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor, workspace = config.progress_monitor, config._pools.get("WORKSPACE")
        monitor.phase_start("Building engine", None, 4)
        for step in range(4):
            monitor.step_complete("Building engine", step)
        monitor.phase_finish("Building engine")
        if "signal" in _WANTED:
            print("about to fall", flush=True)  # a native library's print: it must not reach the protocol
            os.kill(os.getpid(), signal.Signals[_WANTED["signal"]])
        limit = _WANTED.get("memory")
        if limit is not None and (workspace is None or workspace > limit):
            self._logger.log(
                ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)"
            )
            return None
        if "build_error" in _WANTED:
            self._logger.log(ILogger.ERROR, _WANTED["build_error"])
            return None
        if _WANTED.get("plan") == "foreign":
            return IHostMemory(b"not a plan at all" * 10)
        self._logger.log(ILogger.WARNING, "a warning")
        self._logger.log(ILogger.INFO, "no news")
        if config._cache is not None:
            config._cache.entries.add(_WANTED.get("kernel", "kernel"))
        told = {
            "strongly_typed": network.strongly_typed,
            "flags": config._flags,
            "pools": config._pools,
            "profiles": config._profiles,
            "level": config.builder_optimization_level,
            "verbosity": ProfilingVerbosity(config.profiling_verbosity).name,
            "hardware": HardwareCompatibilityLevel(config.hardware_compatibility_level).name,
            "tiling": getattr(config, "tiling_optimization_level", None),
        }
        return IHostMemory(b"ftrt" + bytes(60) + json.dumps(told).encode())


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class EngineInspector:
    execution_context = None

    def get_engine_information(self, format):
        assert format == LayerInformationFormat.JSON
        shapes = {} if self.execution_context is None else self.execution_context.shapes
        return json.dumps({"Layers": [f"conv at {shapes.get('x', 'N/A due to dynamic shapes')}"]})


class IExecutionContext:
    def __init__(self):
        self.shapes = {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = list(shape)
        return True


class ICudaEngine:
    num_io_tensors = 2

    def create_engine_inspector(self):
        return EngineInspector()

    def create_execution_context(self):
        return None if _WANTED.get("load") == "no memory" else IExecutionContext()

    def get_tensor_name(self, index):
        return ("x", "y")[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        return (-1, 3, 8, 8)

    def get_tensor_profile_shape(self, name, profile):
        return [(1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)]

    if _V >= (10, 13):

        def create_runtime_config(self):
            raise NotImplementedError

    if _V >= (11,):

        def get_engine_stat(self, stat):
            raise NotImplementedError


class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, plan):
        if _WANTED.get("load") == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if _WANTED.get("load") == "refuse":
            self._logger.log(ILogger.ERROR, "Version tag does not match")
            return None
        return ICudaEngine()
