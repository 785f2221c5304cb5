"""What runs a network: Keras, or LiteRT, which needs no TensorFlow. Both give the same things in the same form.

    KerasRuntime(model)                 a network in memory, its batch normalizations folded, in the best precision
    LiteRtRuntime('melnyk_net.tflite')  an exported file

A runtime gives logits and *weighted features*: the last feature maps, each value times its pooling weight. Their sums
are what the classifier sees, so that both together give the class activation maps of any network of this project.
"""

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from model_file import ModelFileError, ModelInfo, read_tflite

# Batches are filled up with empty images to one of these sizes, so that a network is prepared for few shapes only.
BATCH_SIZES = (1, 8, 64)

# The largest array of an exported network: ten times what Melnyk-Net has.
_MAX_VALUES = 2**24

PRECISIONS = ('auto', 'float32', 'bfloat16')


class Outputs(NamedTuple):
    """What a network says of n images."""

    logits: np.ndarray
    """float32 `(n, classes)`: what a softmax turns into probabilities."""
    features: np.ndarray
    """float32 `(n, height, width, channels)`: the last feature maps times the pooling's weights."""


@runtime_checkable
class Runtime(Protocol):
    """A network that is ready to run."""

    input_shape: tuple[int, int, int]
    """`(height, width, channels)`; a single channel."""
    num_classes: int

    def run(self, inputs: np.ndarray) -> Outputs:
        """Run the network. Several threads may do so at once.

        Args:
            inputs: Array of shape `(n, height, width)`, n from 1 to 64, values 0..255, ink bright on 0.

        Returns:
            `Outputs` for the n images.

        Raises:
            model_file.ModelFileError: If a logit is not finite.
        """

    def classifier(self) -> np.ndarray:
        """Return the classifier's weights, float32 `(channels, classes)`."""


def _finite(path, outputs: Outputs) -> Outputs:
    """Return what a network gives; refuse what is no number, of which a softmax would make a confident answer."""
    if not np.isfinite(outputs.logits).all():
        raise ModelFileError(path, 'its answers are not numbers')
    return outputs


# --- Keras -----------------------------------------------------------------------------------------------------------


class KerasRuntime:
    """Runs a Keras network, on any backend.

    Every batch normalization that follows a convolution is folded into it, which changes the results by rounding only
    (B. Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
    CVPR 2018, section 3.2). The classifier is always computed in float32.

    Args:
        model: A network of this project with its classifier.
        precision: `'float32'`, `'bfloat16'`, or `'auto'`, which is bfloat16 where this halves the time at no loss that
            could be measured: on processors that multiply bfloat16, without depthwise convolutions. Defaults to
            `'auto'`.
        path: The file that the network is from, for errors to name. Defaults to the name of the network.

    Attributes:
        model: The network as it was given.
        precision: `'float32'` or `'bfloat16'`.

    Raises:
        ValueError: If the precision is none of these, or the network does not end in global pooling and a classifier.
    """

    def __init__(self, model, precision='auto', path: str | os.PathLike | None = None):
        if precision not in PRECISIONS:
            raise ValueError(f'precision is one of {", ".join(PRECISIONS)}, received {precision!r}')
        self.model = model
        self._path = path or model.name
        self.precision = _best_precision(model) if precision == 'auto' else precision
        self.input_shape = tuple(model.input_shape[1:])
        self.num_classes = model.output_shape[-1]
        network = inference_network(model, self.precision)
        self._kernel = network.layers[-1].kernel
        self._call = _compiled(network)

    def run(self, inputs: np.ndarray) -> Outputs:
        """See `Runtime.run`."""
        size = next((size for size in BATCH_SIZES if size >= len(inputs)), len(inputs))
        padded = np.zeros((size, *self.input_shape), np.float32)
        padded[: len(inputs), ..., 0] = inputs
        outputs = Outputs(*(np.asarray(output)[: len(inputs)] for output in self._call(padded)))
        return _finite(self._path, outputs)

    def classifier(self) -> np.ndarray:
        """See `Runtime.classifier`."""
        from keras import ops

        return ops.convert_to_numpy(self._kernel)


def inference_network(model, precision='float32'):
    """Return a network for inference alone: folded, without dropout, with logits instead of probabilities.

    Args:
        model: A network of this project with its classifier.
        precision: `'float32'` or `'bfloat16'`, of everything before the pooling.

    Returns:
        A `keras.Model` of `(batch, height, width, channels)` → `[logits (batch, classes), weighted features (batch,
        height, width, channels)]`, float32, with weights of its own. Its last layer is the classifier.

    Raises:
        ValueError: If the network does not end in global pooling and a classifier.
    """
    import keras
    from keras import layers

    from pooling import POOLINGS, WeightedFeatures

    poolings = [layer for layer in model.layers if isinstance(layer, tuple(kind for _, kind in POOLINGS.values()))]
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
    if not poolings or not dense:
        raise ValueError(f'{model.name!r} does not end in global pooling and a classifier')
    pooling, classifier = poolings[-1], dense[-1]

    trunk = _folded(keras.Model(model.inputs[0], pooling.input), precision)
    weighted, pooled = WeightedFeatures(pooling, name='weighted_features')(trunk.outputs[0])
    # Whatever stands between pooling and classifier leaves the features alone, as dropout does.
    last = layers.Dense(classifier.units, dtype='float32', name=classifier.name)
    logits = last(pooled)
    last.set_weights(classifier.get_weights())
    return keras.Model(trunk.inputs[0], [logits, weighted], name=model.name)


def _folded(trunk, precision: str):
    """Return a copy of a network whose batch normalizations are part of the convolutions before them."""
    import keras
    from keras import layers

    followers = {}
    for layer in trunk.layers:
        if isinstance(layer, layers.BatchNormalization):
            followers[id(layer.input)] = layer
    uses = [id(tensor) for operation in trunk.operations for tensor in operation_inputs(operation)]
    uses += [id(tensor) for tensor in trunk.outputs]
    normalizations = {
        layer.name: followers[id(layer.output)]
        for layer in trunk.layers
        if isinstance(layer, layers.Conv2D | layers.DepthwiseConv2D)
        and id(layer.output) in followers
        and uses.count(id(layer.output)) == 1
        and layer.activation is keras.activations.linear
    }
    left_out = {layer.name for layer in normalizations.values()}

    def copied(layer):
        config = layer.get_config()
        if 'dtype' in config:  # a bare operation, such as `keras.ops.add`, computes in what it is given
            config['dtype'] = precision
        if layer.name in normalizations:
            config['use_bias'] = True
        return type(layer).from_config(config)

    def called(layer, *arguments, **keywords):
        return arguments[0] if layer.name in left_out else layer(*arguments, **keywords)

    copy = keras.models.clone_model(trunk, clone_function=copied, call_function=called)
    for layer in copy.layers:
        weights = trunk.get_layer(layer.name).get_weights() if layer.weights else None
        if layer.name in normalizations:
            weights = _fold(weights, normalizations[layer.name], isinstance(layer, layers.DepthwiseConv2D))
        if weights:
            layer.set_weights(weights)
    return copy


def operation_inputs(operation) -> list:
    """Return the tensors that an operation of a Keras network takes; identity tells which are the same."""
    import keras

    return keras.tree.flatten(operation.input)


def _fold(weights: Sequence[np.ndarray], normalization, depthwise: bool) -> list[np.ndarray]:
    """Return kernel and bias of a convolution with the batch normalization that follows it.

    `γ · (w∗x + b − μ) / √(σ² + ε) + β` is a convolution with the kernel `s · w` and the bias `β + s · (b − μ)`, where
    `s = γ / √(σ² + ε)`.
    """
    variables = {variable.name: np.asarray(value, np.float64) for variable, value in _values(normalization)}
    scale = variables.get('gamma', 1) / np.sqrt(variables['moving_variance'] + normalization.epsilon)
    bias = weights[1] if len(weights) > 1 else 0
    bias = variables.get('beta', 0) + scale * (bias - variables['moving_mean'])
    # The kernel is (height, width, in, out), and a depthwise one (height, width, channels, multiplier).
    kernel = weights[0] * (scale.reshape(weights[0].shape[2:]) if depthwise else scale)
    return [kernel, bias]


def _values(layer):
    return zip(layer.weights, layer.get_weights(), strict=True)


def _compiled(network):
    """Return a function of a float32 batch that is traced once for all batch sizes."""
    import keras

    if keras.backend.backend() != 'tensorflow':
        return network.predict_on_batch
    # Not Keras' own predict function: that compiles with XLA, whose convolutions are slower on processors.
    import tensorflow as tf

    signature = [tf.TensorSpec((None, *network.input_shape[1:]), tf.float32)]
    # There is no Python in it for AutoGraph to translate, which fails aloud where it cannot find the source.
    return tf.function(lambda batch: network(batch, training=False), input_signature=signature, autograph=False)


def has_depthwise_convolutions(model) -> bool:
    """Whether a Keras network is one of MobileNet's kind, which low precision serves otherwise than a plain one."""
    from keras import layers

    return any(isinstance(layer, layers.DepthwiseConv2D) for layer in model.layers)


def _best_precision(model) -> str:
    import keras

    # Processors have no fast depthwise convolution in bfloat16.
    plain = not has_depthwise_convolutions(model)
    if plain and keras.backend.backend() == 'tensorflow' and multiplies_bfloat16():
        import tensorflow as tf

        if not tf.config.list_physical_devices('GPU'):
            return 'bfloat16'
    return 'float32'


def multiplies_bfloat16(cpuinfo='/proc/cpuinfo') -> bool:
    """Whether this processor has instructions for bfloat16; where the system does not say so, it has not."""
    try:
        text = Path(cpuinfo).read_text(encoding='utf-8', errors='replace')
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith('flags')), [])
    return 'avx512_bf16' in flags or 'amx_bf16' in flags


# --- LiteRT ----------------------------------------------------------------------------------------------------------


class LiteRtRuntime:
    """Runs an exported `.tflite` file with LiteRT, the successor of TensorFlow Lite, which takes 60 MB and no Keras.

    A file that nobody should trust is looked at before it runs: its size and signature, its description, and that its
    input, its outputs and the size of every array between them are those of the network described. Answers that are not
    numbers are an error. That leaves what LiteRT does: it checks the structure of the file and the shapes of every
    operator, and has no operator that opens a file or starts a program; but its authors call a model a program, and
    promise nothing about one that is made to break the runtime. For files of strangers `.h5` is the safer format, since
    of it nothing is run.

    One image is spread over all processor cores, unless the network is so small that this costs more than it brings; of
    several images each core takes one after the other.

    Args:
        path: A file that `export.py` wrote.
        threads: How many cores to use. Defaults to all that this process may use.

    Attributes:
        info: What the file says of itself.

    Raises:
        FileNotFoundError: If there is no such file.
        model_file.ModelFileError: If a check fails, or LiteRT is not installed.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None):
        self._path = path
        self._content, self.info = read_tflite(path)
        self.input_shape = self.info.input_shape
        self.num_classes = len(self.info.labels)
        self._threads = threads or usable_cores()
        # An image of MobileNetV3 takes a third of a millisecond on one core, and half of one spread over two.
        together = 1 if self.info.architecture.startswith('mobilenet') else self._threads
        # Created now: it is where a damaged file shows, and the first image waits for nothing else.
        self._workers = [_Worker(path, self._content, self.info, together)]
        self._one_at_a_time = threading.Lock()  # an interpreter serves one thread, and all are busy in a run
        self._pool = ThreadPoolExecutor(max_workers=self._threads, thread_name_prefix='network')

    def run(self, inputs: np.ndarray) -> Outputs:
        """See `Runtime.run`."""
        with self._one_at_a_time:
            answers = self._answers(inputs)
        return _finite(self._path, Outputs(*(np.stack(parts) for parts in zip(*answers, strict=True))))

    def _answers(self, inputs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        if len(inputs) == 1 or self._threads == 1:
            return [self._workers[0](image) for image in inputs]
        while len(self._workers) <= self._threads:
            self._workers.append(_Worker(self._path, self._content, self.info, 1))
        answers = [None] * len(inputs)
        left = iter(range(len(inputs)))

        def work(worker):
            for index in left:  # whoever is free takes the next image
                answers[index] = worker(inputs[index])

        list(self._pool.map(work, self._workers[1:]))
        return answers

    def classifier(self) -> np.ndarray:
        """See `Runtime.classifier`.

        Raises:
            model_file.ModelFileError: If the file does not hold one matrix of that shape.
        """
        with self._one_at_a_time:
            return self._workers[0].matrix(self.num_classes).T


class _Worker:
    """One LiteRT interpreter: a function of one image, for one thread at a time."""

    def __init__(self, path, content: bytes, info: ModelInfo, threads: int):
        self._path = path
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ModuleNotFoundError as error:
            reason, advice = 'LiteRT, which runs it, is not installed', 'pip install -r requirements-light.txt'
            raise ModelFileError(path, reason, advice) from error
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._input, self._outputs = self._described_as(info)
            self._interpreter.allocate_tensors()
        except ModelFileError:
            raise
        except Exception as error:  # a plain RuntimeError or ValueError, with the text of the C++ library
            raise self._damaged(error) from error

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits `(classes,)` and weighted features `(height, width, channels)` of one image.

        Raises:
            model_file.ModelFileError: If LiteRT cannot run the network.
        """
        try:
            self._interpreter.set_tensor(self._input['index'], image.astype(self._input['dtype'])[None, ..., None])
            self._interpreter.invoke()
            return tuple(self._interpreter.get_tensor(output['index'])[0] for output in self._outputs)
        except RuntimeError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ModelFileError:
        reason = str(error).strip().partition('\n')[0]
        return ModelFileError(self._path, f'damaged TensorFlow Lite model ({reason})', 'export it again')

    def matrix(self, num_classes: int) -> np.ndarray:
        """Return the classifier's matrix `(classes, channels)`."""
        shape = (num_classes, int(self._outputs[1]['shape'][-1]))
        found = [tensor for tensor in self._interpreter.get_tensor_details() if tuple(tensor['shape']) == shape]
        if len(found) != 1:
            raise ModelFileError(self._path, f'no class activation maps: {len(found)} matrices of the shape {shape}')
        values = self._interpreter.get_tensor(found[0]['index']).astype(np.float32)
        quantization = found[0]['quantization_parameters']
        if len(quantization['scales']):  # one for all classes, or one for each
            values = (values - quantization['zero_points'][:, None]) * quantization['scales'][:, None]
        return values

    def _described_as(self, info: ModelInfo):
        """Return the details of the input and of (logits, features), which are told apart by their rank."""
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        shapes = [tuple(map(int, tensor['shape'])) for tensor in inputs]
        if shapes != [(1, *info.input_shape)] or inputs[0]['dtype'] not in (np.uint8, np.float32):
            raise ModelFileError(self._path, f'its input is {shapes} instead of the described {(1, *info.input_shape)}')
        if inputs[0]['dtype'] == np.uint8 and inputs[0]['quantization'] != (1.0, 0):
            raise ModelFileError(self._path, 'its input is not 0 to 255')
        outputs = sorted(outputs, key=lambda tensor: len(tensor['shape']))
        shapes = [tuple(map(int, tensor['shape'])) for tensor in outputs]
        if (
            [tensor['dtype'] for tensor in outputs] != [np.float32, np.float32]
            or shapes[0] != (1, len(info.labels))
            or len(shapes[1]) != 4
            or shapes[1][0] != 1
        ):
            raise ModelFileError(self._path, f'its outputs are {shapes}, no logits of {len(info.labels)} classes')
        largest = max(math.prod(map(int, tensor['shape'])) for tensor in self._interpreter.get_tensor_details())
        if largest > _MAX_VALUES:
            raise ModelFileError(self._path, f'an array of {largest:,} values is more than such a network needs')
        return inputs[0], outputs


def usable_cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- Class activation maps -------------------------------------------------------------------------------------------


def activation_maps(features: np.ndarray, classifier: np.ndarray, classes, relative: bool = False) -> np.ndarray:
    """Return the class activation maps of a batch.

    `M_c[x, y] = Σ_k W[x, y, k] · f[x, y, k] · w[k, c]` with the pooling's `W` and the classifier's `w`: the part of
    class c's score that comes from each position (B. Zhou et al., CVPR 2016).

    Args:
        features: `(n, height, width, channels)` array, the weighted features of a `Runtime`.
        classifier: `(channels, classes)` array, the `classifier` of a `Runtime`.
        classes: n class indices.
        relative: Whether to take off the mean of the maps of all classes. A softmax does not see what all classes
            share, and in a map it hides what speaks for this one. Defaults to `False`, the paper's map.

    Returns:
        float32 array of shape `(n, height, width)`, 6×6 for an image of 96×96; any sign, not scaled.
    """
    chosen = classifier[:, list(classes)]
    if relative:
        chosen = chosen - classifier.mean(axis=1, keepdims=True)
    return np.einsum('bxyk,kb->bxy', features, chosen)


def class_activation_map(model, image, class_index: int) -> np.ndarray:
    """Return where a network sees a class in an image.

    Args:
        model: A Keras network of this project with its classifier.
        image: Array of shape `(height, width)`, `(height, width, 1)` or with a batch axis of 1 before; network input,
            values 0..255, ink bright on 0.
        class_index: Index of the class in the network's output.

    Returns:
        float32 array of shape `(height, width)`: the map, bilinearly enlarged to the image. What is high speaks for the
        class; any sign, not scaled.

    Raises:
        ValueError: If the model does not end in global pooling and a classifier, or there is no such class.
    """
    runtime = KerasRuntime(model, 'float32')
    if not 0 <= class_index < runtime.num_classes:
        raise ValueError(f'the network has classes 0 to {runtime.num_classes - 1}, received {class_index}')
    shape = runtime.input_shape[:2]
    features = runtime.run(np.asarray(image).reshape(1, *shape)).features
    return enlarge(activation_maps(features, runtime.classifier(), [class_index])[0], shape)


def enlarge(activation_map: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Enlarge a map bilinearly to `(height, width)`, float32."""
    from PIL import Image

    small = Image.fromarray(np.asarray(activation_map, np.float32))
    return np.asarray(small.resize(shape[::-1], Image.Resampling.BILINEAR))
