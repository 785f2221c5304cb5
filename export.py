"""Exports a network for other programs: a `.tflite` file for LiteRT, which main.py runs too, or an `.onnx` file.

    python melnyk_net.py export melnyk_net.h5 melnyk_net.tflite --int8 --calibrate material
    python melnyk_net.py export melnyk_net.h5 melnyk_net.onnx
    python melnyk_net.py export melnyk_net.h5 small.tflite --int8 --calibrate scans.npz --data samples.npz
    python melnyk_net.py export mobilenet_v3.h5 mobilenet_v3.tflite --int8

The exported network reads one image, `(1, 96, 96, 1)` with the ink bright on 0 (values 0 to 255; uint8 for Melnyk-Net
with --int8, else float32), and gives logits `(1, 3755)` and weighted features `(1, 6, 6, 448)`, both float32: see
`inference`. The labels and what else is known of the network are in the file, as JSON: see `model_file`.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from command_line import message, quiet_libraries
from data_utils import printable, written_aside
from inference import Outputs, has_depthwise_convolutions, inference_network, operation_inputs
from model_file import ModelInfo, describe

FORMATS = ('.tflite', '.onnx')
CALIBRATION_SAMPLES = 1000
# Half of what one channel's range exceeds another's by goes to the activation, half to the next kernel.
EQUALISATION = 0.5


class ExportError(ValueError):
    """What was asked for cannot be exported. The text says why and what to do next."""


def export(
    model, info: ModelInfo, path: str | os.PathLike, int8: bool = False, calibration: np.ndarray | None = None
) -> None:
    """Export a network.

    Args:
        model: A Keras network of this project with its classifier.
        info: What is to stand in the file.
        path: Where to, a name that ends in `.tflite` or `.onnx`. The file is written aside and renamed.
        int8: Whether the network computes in 8-bit integers (`.tflite` only). The kernels are quantised by the range of
            each output channel; how the activations are, `has_fixed_ranges` tells. Defaults to `False`, float32.
        calibration: uint8 array of shape `(n, height, width)`, network inputs with ink bright on 0, which show the
            ranges of the activations where they are fixed. Defaults to `None`.

    Raises:
        ExportError: If the file cannot be of this kind.
        OSError: If it cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ExportError(f'an exported file ends in {" or ".join(FORMATS)}, received {path}')
    if path.suffix == '.onnx' and int8:
        raise ExportError(f'8-bit networks are exported to .tflite only, received {path}')
    fixed = int8 and has_fixed_ranges(model)
    if fixed and calibration is None:
        raise ExportError(f'{info.architecture} in 8 bits needs images that show the ranges of its activations')
    network = inference_network(model)
    if fixed:
        equalise(network, calibration)
    with written_aside(path) as aside:
        if path.suffix == '.onnx':
            _write_onnx(network, aside)
        else:
            aside.write_bytes(_tflite(network, int8, calibration if fixed else None))
        describe(aside, info)


# --- Quantisation ----------------------------------------------------------------------------------------------------


def has_fixed_ranges(model) -> bool:
    """Whether a network in 8 bits has ranges of its activations that are fixed when it is exported.

    That is fastest, and nothing is lost where only ReLU and pooling stand between the convolutions. MobileNetV3, with
    h-swish and squeeze-and-excitation, lost up to several points in this way, depending on the images that showed the
    ranges, and was slower than in float32: there LiteRT takes the range of each image as it comes.

    Args:
        model: A Keras network of this project.
    """
    return not has_depthwise_convolutions(model)


def equalise(network, images: np.ndarray, share: float = EQUALISATION) -> None:
    """Bring the channels between two convolutions to like ranges, in place; what the network computes stays the same.

    All channels of an activation are quantised with one scale, and channels of small values lose their digits. Where
    nothing but ReLU and average pooling stands between two convolutions, a channel may be divided by any positive
    number if the next kernel is multiplied by it (M. Nagel et al., "Data-free quantization through weight equalization
    and bias correction", ICCV 2019; here with the ranges that images show).

    Args:
        network: An `inference.inference_network`.
        images: uint8 array of shape `(n, height, width)`, network inputs.
        share: 1 makes the ranges of the activations alike, 0 those of the kernels. Defaults to `0.5`.
    """
    import keras

    pairs = list(_pairs(network))
    if not pairs:
        return
    outputs = keras.Model(network.inputs[0], [first.output for first, _ in pairs])
    peaks = [np.zeros(first.filters, np.float32) for first, _ in pairs]  # after the ReLU
    for start in range(0, len(images), 32):
        values = keras.tree.flatten(outputs.predict_on_batch(images[start : start + 32, ..., None].astype(np.float32)))
        peaks = [np.maximum(peak, value.max(axis=(0, 1, 2))) for peak, value in zip(peaks, values, strict=True)]
    for (first, second), ranges in zip(pairs, peaks, strict=True):
        kernel, bias = first.get_weights()
        next_kernel, *next_bias = second.get_weights()
        next_ranges = np.abs(next_kernel).max(axis=(0, 1, 3))
        if not ranges.any():
            continue
        # What is hardly ever used would get a scale without bounds.
        ranges = np.maximum(ranges, 1e-3 * ranges.max())
        next_ranges = np.maximum(next_ranges, 1e-3 * next_ranges.max())
        scale = ranges**share / next_ranges ** (1 - share)
        scale /= np.exp(np.log(scale).mean())
        first.set_weights([kernel / scale, bias / scale])
        second.set_weights([next_kernel * scale[:, None], *next_bias])


def _pairs(network) -> Iterator[tuple]:
    """Give the convolutions of a network between which nothing but ReLU and average pooling stands."""
    from keras import layers

    consumers = {}
    for operation in network.operations:
        for tensor in operation_inputs(operation):
            consumers.setdefault(id(tensor), []).append(operation)

    def next_of(operation):
        found = consumers.get(id(operation.output), [])
        return found[0] if len(found) == 1 else None

    for first in network.layers:
        if not isinstance(first, layers.Conv2D) or not _is_relu(following := next_of(first)):
            continue
        while _is_relu(following) or isinstance(following, layers.AveragePooling2D):
            following = next_of(following)
        if isinstance(following, layers.Conv2D) and following.groups == 1:
            yield first, following


def _is_relu(layer) -> bool:
    import keras
    from keras import layers

    if isinstance(layer, layers.Activation):
        return layer.activation is keras.activations.relu
    return (
        isinstance(layer, layers.ReLU) and layer.max_value is None and not layer.threshold and not layer.negative_slope
    )


def _tflite(network, int8: bool, calibration: np.ndarray | None) -> bytes:
    """Return a network as a TensorFlow Lite model, with fixed ranges of the activations if there are images."""
    with _quiet_tensorflow():
        import tensorflow as tf

        converter = tf.lite.TFLiteConverter.from_keras_model(_single(network))
        if int8:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if calibration is not None:
            converter.representative_dataset = lambda: _representative(calibration)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = tf.uint8
        content = converter.convert()
        return content if calibration is None else _with_float_logits(content)


def _with_float_logits(content: bytes) -> bytes:
    """Let a quantised network add up its features and compute its logits in float32; the kernel stays in 8 bits.

    256 levels are too few to tell 3755 classes apart: the best two often share one.
    """
    from tensorflow.lite.python import schema_py_generated as schema
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    (graph,) = model.subgraphs
    tensors, operators = graph.tensors, graph.operators
    makers = {int(tensor): operator for operator in operators for tensor in operator.outputs}
    features, logits = sorted(graph.outputs, key=lambda tensor: -len(tensors[tensor].shape))
    # features → SUM → FULLY_CONNECTED → DEQUANTIZE, in integers, becomes dequantised features → SUM → FULLY_CONNECTED.
    last, first = makers[logits], makers[features]
    dense = makers[int(last.inputs[0])]
    total = makers[int(dense.inputs[0])]
    if int(total.inputs[0]) != int(first.inputs[0]):
        raise ExportError(f'the converter has left another graph than expected at {tensors[logits].name!r}')
    total.inputs[0], dense.outputs = features, [logits]
    operators.remove(last)
    operators.remove(first)
    operators.insert(operators.index(total), first)

    made_float = [tensors[int(total.outputs[0])]]
    if len(dense.inputs) > 2 and dense.inputs[2] >= 0:  # zeros are left out
        bias = tensors[int(dense.inputs[2])]
        steps = np.frombuffer(bytes(model.buffers[bias.buffer].data), '<i4')
        values = (steps * np.asarray(bias.quantization.scale)).astype('<f4')
        model.buffers.append(schema.BufferT())  # of its own: the old one may serve another tensor too
        model.buffers[-1].data = np.frombuffer(values.tobytes(), np.uint8)
        bias.buffer = len(model.buffers) - 1
        made_float.append(bias)
    for tensor in made_float:
        tensor.type, tensor.quantization = schema.TensorType.FLOAT32, None
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _representative(images: np.ndarray) -> Iterator[list[np.ndarray]]:
    # The full range of gray levels in each, so that the input keeps its scale of one.
    for image in images:
        image = image.astype(np.float32)
        image.flat[:2] = 0, 255
        yield [image[None, ..., None]]


def _single(network):
    """Return a network for batches of one."""
    import keras

    image = keras.Input(batch_shape=(1, *network.input_shape[1:]), name='image')
    return keras.Model(image, network(image), name=network.name)


def _write_onnx(network, path: Path) -> None:
    """Write a network as ONNX, for batches of any size."""
    try:
        import tf2onnx  # noqa: F401 (Keras needs it, and would say so in a dozen lines)
    except ModuleNotFoundError as error:
        raise ExportError('ONNX needs tf2onnx: pip install -r requirements-export.txt') from error
    import keras

    signature = [keras.InputSpec(shape=network.input_shape, dtype='float32')]
    with _quiet_tensorflow():
        network.export(path, format='onnx', verbose=False, input_signature=signature)


class OnnxRuntime:
    """Runs an exported `.onnx` file with ONNX Runtime, to see what came of it; an `inference.Runtime`.

    Args:
        path: A file that `export` wrote.

    Raises:
        ExportError: If ONNX Runtime is not installed.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ExportError(f'{path} is run by onnxruntime: pip install -r requirements-export.txt') from error
        self._session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        (self._input,) = self._session.get_inputs()
        self.input_shape = tuple(self._input.shape[1:])
        self.num_classes = self._session.get_outputs()[0].shape[-1]

    def run(self, inputs: np.ndarray) -> Outputs:
        """See `inference.Runtime.run`."""
        return Outputs(*self._session.run(None, {self._input.name: inputs[..., None].astype(np.float32)}))

    def classifier(self) -> np.ndarray:
        """Not given: maps of an `.onnx` file are its own user's matter."""
        raise NotImplementedError('no class activation maps from .onnx files')


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """Keep the converters' reports on every tensor off the terminal. What goes wrong is an exception."""
    with (
        quiet_libraries(1, 2),
        open(os.devnull, 'w') as nowhere,
        warnings.catch_warnings(action='ignore'),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


# --- The command line ------------------------------------------------------------------------------------------------


def calibration_images(sources: Sequence[str], count: int, size: int) -> np.ndarray:
    """Return network inputs to calibrate with.

    Args:
        sources: A folder of `handwriting.py`'s material, from which samples are drawn; or labelled data as
            `evaluate.py` reads it.
        count: How many images at most.
        size: Their side in pixels.

    Returns:
        uint8 array of shape `(n, size, size)`, ink bright on 0.

    Raises:
        ExportError, ValueError, OSError: If there is nothing.
    """
    from handwriting import DrawingOptions, Material, MaterialError, sample_batch

    if len(sources) == 1 and Path(sources[0]).is_dir():
        with contextlib.suppress(MaterialError):
            # Whole characters as they are written: what is spliced and distorted would widen the ranges.
            options = DrawingOptions(splice=0, distort=0)
            return sample_batch(Material.load(Path(sources[0])), 0, range(count), options, size)[0]
    from evaluate import iterate_samples

    chunks = [chunk.images for chunk in iterate_samples(sources, size)]
    if not chunks:
        raise ExportError(f'{", ".join(sources)}: neither material of handwriting.py nor samples to calibrate with')
    images = np.concatenate(chunks)
    return images[:: -(-len(images) // count)]  # evenly over all of them, since sources are in some order


def accuracies(recogniser, data: Iterable[str]) -> tuple[float, float, int]:
    """Return top-1 and top-5 accuracy, 0..1, of a recogniser on labelled data, and the number of samples."""
    from evaluate import iterate_samples, measure

    answers, *_ = measure(recogniser, iterate_samples(data, recogniser.size, labels=recogniser.labels))
    return answers.top(1), answers.top(5), len(answers.labels)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the export."""
    parser.add_argument('source', metavar='MODEL.h5', help='the model file to export')
    parser.add_argument('target', metavar='OUT.tflite|OUT.onnx', help='the file to write')
    parser.add_argument(
        '--int8', action='store_true', help='8-bit integers: a quarter of the size, several times as fast'
    )
    parser.add_argument(
        '--calibrate',
        nargs='+',
        default=['material'],
        metavar='PATH',
        help="what --int8 finds the ranges of Melnyk-Net's values with (MobileNetV3 needs nothing): handwriting.py's "
        'material, or labelled samples as evaluate.py reads them (default: material)',
    )
    parser.add_argument(
        '--samples',
        type=int,
        default=CALIBRATION_SAMPLES,
        metavar='N',
        help=f'how many images to calibrate with (default: {CALIBRATION_SAMPLES})',
    )
    parser.add_argument(
        '--data', nargs='+', metavar='PATH', help='labelled samples on which the accuracy of both files is measured'
    )


def run(options: argparse.Namespace) -> None:
    """Export as the command line says, and print what came of it.

    Raises:
        ValueError, OSError: If something is not as it should be.
    """
    if options.int8 and options.samples < 1:
        raise ExportError(f'--samples is at least 1, received {options.samples}')
    with quiet_libraries():
        from hccr import HCCR
        from melnyk_net import load_model

        model, info = load_model(options.source)
    calibration = None
    if options.int8 and has_fixed_ranges(model):
        calibration = calibration_images(options.calibrate, options.samples, info.input_shape[0])
    export(model, info, options.target, options.int8, calibration)
    megabytes = [Path(name).stat().st_size / 1e6 for name in (options.source, options.target)]
    source, target = printable(options.source), printable(options.target)
    print(f'{target}: {megabytes[1]:.1f} MB ({source}: {megabytes[0]:.1f} MB)')
    if not options.data:
        return
    exported = OnnxRuntime(options.target) if Path(options.target).suffix == '.onnx' else options.target
    for name, network in ((source, model), (target, exported)):
        with quiet_libraries():  # LiteRT tells what it runs on
            recogniser = HCCR(network, info.labels, precision='float32')
        top_1, top_5, count = accuracies(recogniser, options.data)
        print(f'{name}: top-1 {100 * top_1:.2f} %, top-5 {100 * top_5:.2f} % of {count:,} samples', flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of melnyk_net.py; return the exit status."""
    parser = argparse.ArgumentParser(prog='melnyk_net.py', description='What is done with a model file.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    command = commands.add_parser(
        'export',
        help='export the network for other programs',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(command)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'melnyk_net.py: {message(error)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    print('export.py: run it as `python melnyk_net.py export MODEL.h5 OUT.tflite`', file=sys.stderr)
    sys.exit(2)
