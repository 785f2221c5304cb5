"""What learns: a network with its loss, its teacher, the weights that it starts from, and the average of its weights.

It is apart from `train`, so that the command line answers before Keras is there.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
from keras import ops

from feed import Batch, name_of
from inference import multiplies_bfloat16
from melnyk_net import load_model
from pooling import POOLINGS

AVERAGE_EVERY = 10  # steps between two updates of the average of the weights: copying them costs time on an accelerator


class LearnerError(ValueError):
    """A teacher, or weights to start from, that do not fit; the text says why and what to do next."""


# --- What one step computes ------------------------------------------------------------------------------------------


class TrainingModel(keras.Model):
    """A student with its loss: batches of network inputs in, logits out.

    Args:
        student: Network whose classifier gives logits.
        teacher: Model that gives logits of the same classes, or `None`.
        label_weight: Weight of the label's cross-entropy beside the teacher's.
        temperature: Divides both logits before they are compared (G. Hinton et al., arXiv 1503.02531).

    Input shape:
        `(batch, 96, 96)` uint8. Student and teacher see it at the size that each was built for. Where the teacher has
        answered before: a tuple of that and its logits, `(batch, num_classes)` of any precision.

    Output shape:
        `(batch, num_classes)` float32.
    """

    def __init__(self, student: keras.Model, teacher: keras.Model | None, label_weight: float, temperature: float):
        super().__init__(dtype='float32', name='training')
        self.student = student
        self.teacher = teacher
        if teacher is not None:
            teacher.trainable = False
        self.label_weight = label_weight
        self.temperature = temperature

    def call(self, inputs, training=None):
        images = inputs[0] if isinstance(inputs, tuple) else inputs
        return ops.cast(self.student(resized(images, self.student.input_shape[1]), training=training), 'float32')

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        # y: (batch,) class indices; sample_weight: (batch,) 1 where the label is trusted, else 0
        y, sample_weight = ops.convert_to_tensor(y), ops.convert_to_tensor(sample_weight)  # PyTorch gets them as arrays
        labelled = ops.mean(sample_weight * ops.sparse_categorical_crossentropy(y, y_pred, from_logits=True))
        if not training:
            return labelled
        loss = sum(self.losses, start=ops.zeros(()))  # the L2 terms
        if isinstance(x, tuple):
            target = x[1]
        elif self.teacher is not None:
            target = ops.stop_gradient(self.teacher(resized(x, self.teacher.input_shape[1]), training=False))
        else:
            return loss + labelled
        target = ops.log_softmax(ops.cast(target, 'float32') / self.temperature)  # (batch, classes)
        answer = ops.log_softmax(y_pred / self.temperature)
        divergence = ops.mean(ops.sum(ops.exp(target) * (target - answer), axis=-1))
        # The gradient of a softened softmax is smaller by the temperature squared.
        return loss + self.temperature**2 * divergence + self.label_weight * labelled


class ClassCounts(keras.metrics.Metric):
    """Counts for each class the samples that are right, and all of them; what macro recall is made of.

    Result shape:
        `(2, num_classes)` float32: right, all; samples of no weight are not counted.
    """

    def __init__(self, num_classes: int, name: str = 'classes'):
        super().__init__(name=name)
        self.num_classes = num_classes
        self.counts = self.add_variable((2, num_classes), initializer='zeros', name='counts')

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true = ops.reshape(ops.cast(y_true, 'int32'), (-1,))
        weight = ops.ones_like(y_true, 'float32') if sample_weight is None else ops.cast(sample_weight, 'float32')
        weight = ops.reshape(weight, (-1,))
        right = weight * ops.cast(ops.cast(ops.argmax(y_pred, axis=-1), 'int32') == y_true, 'float32')
        # A product of matrices, which every backend shares among devices.
        self.counts.assign_add(ops.matmul(ops.stack([right, weight]), ops.one_hot(y_true, self.num_classes)))

    def result(self):
        return ops.convert_to_tensor(self.counts)


def macro_recall(counts: np.ndarray) -> float:
    """Return the mean recall of the classes that have samples, given (2, classes) counts of right and all; 0..1."""
    right, samples = counts[:, counts[1] > 0]
    return float(np.mean(right / samples)) if samples.size else 0.0


def resized(images, size: int):
    """Return `(batch, h, h)` images of any dtype as float32 `(batch, size, size, 1)`: each pixel a mean of an area."""
    images = ops.cast(images, 'float32')
    if images.shape[1] != size:
        areas = ops.convert_to_tensor(area_weights(images.shape[1], size))
        images = ops.einsum('yi,bij,xj->byx', areas, images, areas)
    return ops.expand_dims(images, -1)


def area_weights(old: int, new: int) -> np.ndarray:
    """Return the float32 `(new, old)` matrix that takes means over areas; its rows sum to 1."""
    edges = np.linspace(0, old, new + 1)
    pixels = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0) * (new / old)).astype(np.float32)


def batch_normalization(momentum: float) -> Callable[..., keras.layers.Layer]:
    """Return what makes the layer after each convolution: the fastest with the same weights and the same result."""
    layer = _fused_batch_normalization() if _on_tensorflow_processor() else keras.layers.BatchNormalization
    return functools.partial(layer, momentum=momentum)


def fast_precision(wanted: str) -> str:
    """Return a precision to compute in: bfloat16 is float32 where TensorFlow runs on a processor that lacks it."""
    return 'float32' if _on_tensorflow_processor() and not multiplies_bfloat16() else wanted


def _on_tensorflow_processor() -> bool:
    if keras.backend.backend() != 'tensorflow':
        return False
    import tensorflow as tf

    return not tf.config.list_physical_devices('GPU')


@functools.cache
def _fused_batch_normalization() -> type[keras.layers.Layer]:
    import tensorflow as tf

    class FusedBatchNormalization(keras.layers.BatchNormalization):
        """Batch normalization by TensorFlow's fused operation: on a processor a training step takes 0.6 of the time."""

        def call(self, inputs, training=None, mask=None):
            training = bool(training) and self.trainable
            empty = tf.zeros((0,))
            outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=inputs,
                scale=tf.convert_to_tensor(self.gamma),
                offset=tf.convert_to_tensor(self.beta),
                mean=empty if training else tf.convert_to_tensor(self.moving_mean),
                variance=empty if training else tf.convert_to_tensor(self.moving_variance),
                epsilon=self.epsilon,
                is_training=training,
            )
            if training:
                # The fused operation returns the unbiased variance, Keras keeps the biased one.
                count = tf.cast(tf.size(inputs) / tf.shape(inputs)[-1], tf.float32)
                variance = variance * (count - 1) / count
                self.moving_mean.assign(self.moving_mean * self.momentum + mean * (1 - self.momentum))
                self.moving_variance.assign(self.moving_variance * self.momentum + variance * (1 - self.momentum))
            return outputs

    return FusedBatchNormalization


def to_numpy(variable) -> np.ndarray:
    """Return the value of a variable of any backend."""
    return ops.convert_to_numpy(variable.value)


@contextlib.contextmanager
def on_this_machine() -> Iterator[None]:
    """Keep what is built meanwhile off the other machines, which do not take part in it and would be waited for."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


def as_logits(model: keras.Model) -> keras.Model:
    """Return a classifier that gives logits, whether it ends in a softmax or not. The model itself may be changed."""
    last = model.layers[-1]
    if isinstance(last, keras.layers.Softmax):
        return keras.Model(model.input, last.input)
    if getattr(last, 'activation', None) is keras.activations.softmax:
        last.activation = keras.activations.linear
    return model


def load_teacher(path: str | os.PathLike, labels: Sequence[str], precision: str) -> keras.Model:
    """Load a teacher: any Keras model with our input and class order, or a model file of this project.

    Args:
        path: `.keras` or `.h5`.
        labels: The classes whose logits it has to give, in order.
        precision: `'bfloat16'` or `'float32'`.

    Raises:
        LearnerError: If it cannot be loaded or does not fit.
    """
    with on_this_machine():
        teacher = as_logits(_loaded_teacher(path, labels))
        probe = np.random.default_rng(0).integers(0, 256, (2, *teacher.input_shape[1:])).astype(np.float32)
        answers = np.asarray(ops.convert_to_numpy(teacher(probe, training=False)), np.float32)
    if answers.min() >= 0 and np.allclose(answers.sum(-1), 1, atol=1e-2):
        raise LearnerError(
            f'{path}: a teacher gives logits, and this one gives probabilities; save it without the softmax at its end'
        )

    def at_precision(layer):
        config = layer.get_config()
        # A mean image is subtracted before rounding, else the rounding would be of the sum.
        if precision == 'bfloat16' and not isinstance(layer, keras.layers.Normalization | keras.layers.InputLayer):
            config['dtype'] = 'mixed_bfloat16'
        return type(layer).from_config(config)

    copy = keras.models.clone_model(teacher, clone_function=at_precision)
    copy.set_weights(teacher.get_weights())
    return copy


def _loaded_teacher(path: str | os.PathLike, labels: Sequence[str]) -> keras.Model:
    try:
        if Path(path).suffix in ('.h5', '.hdf5'):
            teacher, info = load_model(path)
            known = info.labels
        else:
            teacher, known = keras.models.load_model(path, compile=False), tuple(labels)
    except (ValueError, OSError, TypeError) as error:
        raise LearnerError(f'{path}: not a teacher that Keras can load ({error})') from error
    if known != tuple(labels):
        raise LearnerError(f'{path}: a teacher knows the same characters; this one knows {name_of(known)}')
    shape = teacher.input_shape
    if len(shape) != 4 or None in shape[1:] or shape[-1] != 1 or teacher.output_shape[-1] != len(labels):
        raise LearnerError(
            f'{path}: a teacher reads (height, width, 1) and gives {len(labels)} logits; '
            f'this one reads {shape[1:]} and gives {teacher.output_shape[1:]}'
        )
    return teacher


def ask(teacher: keras.Model, images: np.ndarray) -> np.ndarray:
    """Return a teacher's logits of network inputs: `(n, 96, 96)` uint8 → `(n, classes)` float32."""
    images = ops.convert_to_numpy(resized(ops.convert_to_tensor(images), teacher.input_shape[1]))
    return np.asarray(teacher.predict_on_batch(images), np.float32)


def carry_weights(
    source: keras.Model, target: keras.Model, shared: tuple[Sequence[int], Sequence[int]] | None = None
) -> None:
    """Copy the weights of one network into another of a different input size, pooling or classes.

    The pooling weights of GWAP belong to places; at another size they are resampled so that their sum stays. Where the
    pooling is of another kind, the target's begins as the source's mean over the places, or stays as it is.

    Args:
        source: A network of this project.
        target: One of the same architecture; its weights are changed.
        shared: (class indices in the source, those in the target) of the characters that both know. The target's other
            classes stay as they are. Defaults to all, in the same order.

    Raises:
        LearnerError: If the networks differ in more than that.
    """
    if source.name != target.name:
        raise LearnerError(f'the weights to start from are of {source.name}; add --architecture {source.name}')
    given = {layer.name: layer for layer in source.layers}
    poolings = {name for name, _ in POOLINGS.values()}
    for layer in target.layers:
        if not layer.weights or layer.name in poolings:
            continue
        if shared and layer.name == 'dense_1':
            theirs, ours = (np.asarray(indices, np.int64) for indices in shared)
            for old_values, variable in zip(given['dense_1'].get_weights(), layer.weights, strict=True):
                values = np.array(to_numpy(variable))
                values[..., ours] = old_values[..., theirs]
                variable.assign(values)
            continue
        if [w.shape for w in given[layer.name].weights] != [w.shape for w in layer.weights]:
            raise LearnerError(f'the weights to start from do not fit in {layer.name}; use a model of as many classes')
        layer.set_weights(given[layer.name].get_weights())
    old, new = (next(layer for layer in model.layers if layer.name in poolings) for model in (source, target))
    places = math.prod(new.input.shape[1:3])
    if not new.weights:
        return
    # GAP's mean is a sum over the places of the target, each of the same weight.
    weight = to_numpy(old.weights[0]) if old.weights else np.full(new.input.shape[-1], 1 / places, np.float32)
    shape = tuple(new.weights[0].shape)
    if weight.ndim == 3 and len(shape) == 3:
        rows, columns = area_weights(weight.shape[0], shape[0]), area_weights(weight.shape[1], shape[1])
        scale = math.prod(weight.shape[:2]) / math.prod(shape[:2])
        weight = np.einsum('yi,ijk,xj->yxk', rows, weight, columns) * scale
    elif weight.ndim == 3:
        weight = weight.mean((0, 1)) * math.prod(weight.shape[:2]) / places
    elif old.weights:
        weight = weight * math.prod(old.input.shape[1:3]) / places
    new.set_weights([np.broadcast_to(weight, shape)])


def shared_classes(source: Sequence[str], target: Sequence[str]) -> tuple[list[int], list[int]] | None:
    """Return where two label tables have the characters that both have; None where the tables are the same."""
    if tuple(source) == tuple(target):
        return None
    places = {character: i for i, character in enumerate(source)}
    pairs = [(places[character], i) for i, character in enumerate(target) if character in places]
    return [theirs for theirs, _ in pairs], [ours for _, ours in pairs]


# --- Measuring -------------------------------------------------------------------------------------------------------


class WeightAverage:
    """The exponential average of all weights, batch normalization's statistics included.

    It is smoother than the weights of any one step, and so better while the learning rate is high. The optimizer's own
    average leaves out what is not trained.

    Args:
        model: Its weights are averaged.
        momentum: Of the average, a step.
    """

    def __init__(self, model: keras.Model, momentum: float):
        self.model, self.momentum = model, momentum
        self.values = [np.array(to_numpy(w), np.float32) for w in model.weights] if momentum else []

    def update(self, step: int) -> None:
        """Take the weights after `step` steps into account: now and then only, once the first steps are past."""
        every = 1 if step < 100 else AVERAGE_EVERY
        if self.momentum and step % every == 0:
            # At the start the average is young: it must forget the weights that it began with.
            keep = min(self.momentum, step / (step + 10)) ** every
            for value, weight in zip(self.values, self.model.weights, strict=True):
                value += (1 - keep) * (to_numpy(weight) - value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for a while; without momentum, leave the weights as they are."""
        weights = self.model.get_weights()
        if self.momentum:
            self.model.set_weights(self.values)
        yield
        if self.momentum:
            self.model.set_weights(weights)


def validate(model: TrainingModel, samples: Batch, batch_size: int, rows: tuple[int, int]) -> dict[str, float]:
    """Measure a model on samples that it does not learn from.

    Args:
        model: The model.
        samples: All of them.
        batch_size: Samples a step, over all machines.
        rows: (first, last + 1) of the rows of each batch that this machine measures.

    Returns:
        `val_loss`, `val_top1`, `val_top5` and `val_macro_recall`, all but the loss 0..1.
    """
    counts = np.zeros((2, model.student.output_shape[-1]))
    sums = dict.fromkeys(('loss', 'top1', 'top5'), 0.0)
    total = len(samples.labels)
    mine = np.arange(*rows)
    for start in range(0, total, batch_size):
        # The last batch is filled up with samples of no weight: one shape, one compiled function.
        places = start + mine
        weights = (places < total).astype(np.float32)
        places = np.minimum(places, total - 1)
        count = min(batch_size, total - start)
        measured = model.test_on_batch(samples.images[places], samples.labels[places], weights, return_dict=True)
        # The loss is a mean over the batch, the accuracies are means over the weights.
        sums['loss'] += float(measured['loss']) * batch_size
        for name in ('top1', 'top5'):
            sums[name] += float(measured[name]) * count
        counts += measured['classes']
    return {f'val_{name}': value / total for name, value in sums.items()} | {'val_macro_recall': macro_recall(counts)}
