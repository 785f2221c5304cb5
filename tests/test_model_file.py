"""Files that nobody should trust, read through `load_model`."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import model_file
from data_utils import LABELS
from melnyk_net import load_model
from model_file import ModelFileError

ROOT = Path(__file__).parents[1]


def change(path, small_file, edit):
    """Copy a good file and edit it with h5py."""
    path.write_bytes(small_file.read_bytes())
    with h5py.File(path, 'r+') as file:
        edit(file)
    return path


def described(file, **changes):
    meaning = json.loads(file.attrs['offline_hccr']) | changes
    file.attrs['offline_hccr'] = json.dumps(meaning)


def replaced(file, name, **dataset):
    name = f'model_weights/{name}'
    del file[name]
    file.create_dataset(name, **dataset)


BIAS, CONV = 'dense_1/dense_1/bias', 'conv2d_2/conv2d_2/kernel'
VARIANCE = 'batch_normalization_1/batch_normalization_1/moving_variance'


def external_link(file):
    del file['model_weights/dense_1']
    file['model_weights/dense_1'] = h5py.ExternalLink('/etc/passwd', '/')


def soft_link(file):
    file.move(f'model_weights/{BIAS}', 'elsewhere')
    file[f'model_weights/{BIAS}'] = h5py.SoftLink('/elsewhere')


def external_storage(file):
    replaced(file, BIAS, shape=(5,), dtype='f4', external=[('/etc/passwd', 0, 20)])


def virtual_dataset(file):
    layout = h5py.VirtualLayout((5,), 'f4')
    layout[:] = h5py.VirtualSource('/etc/passwd', 'x', (5,))
    del file[f'model_weights/{BIAS}']
    file.create_virtual_dataset(f'model_weights/{BIAS}', layout)


def list_for_text(file):
    numbers = np.empty((), object)
    numbers[()] = np.array([1, 2], 'i4')
    file.attrs.create('offline_hccr', numbers, dtype=h5py.vlen_dtype(np.int32))


HOSTILE = {
    'external link': (external_link, 'missing, or a link'),
    'soft link': (soft_link, 'missing, or a link'),
    'external storage': (external_storage, 'not stored in the file'),
    'virtual dataset': (virtual_dataset, 'not stored in the file'),
    'shape bomb': (lambda f: replaced(f, BIAS, shape=(2**40,), dtype='f4', chunks=(2**20,)), 'classes'),
    'kernel bomb': (lambda f: replaced(f, CONV, shape=(2**40,), dtype='f4', chunks=(2**20,)), 'shape'),
    'chunk bomb': (
        lambda f: replaced(f, BIAS, shape=(5,), maxshape=(None,), dtype='f4', chunks=(2**29,), compression='gzip'),
        'chunks',
    ),
    'chunks of a bomb of another rank': (
        lambda f: replaced(f, CONV, shape=(3, 3, 64, 64), maxshape=(None,) * 4, dtype='f4', chunks=(3, 3, 64, 2**20)),
        'chunks',
    ),
    'wrong shape': (lambda f: replaced(f, CONV, data=np.zeros((3, 3, 64, 63), 'f4')), 'shape'),
    'scalar': (lambda f: replaced(f, BIAS, data=np.float32(1)), 'not an array'),
    'text': (lambda f: replaced(f, BIAS, data=[b'abc'] * 5), 'not an array'),
    'not finite': (lambda f: replaced(f, BIAS, data=np.array([0, 1, np.nan, 0, 0], 'f4')), 'not finite'),
    'a variance below 0': (lambda f: replaced(f, VARIANCE, data=np.linspace(-1e-3, 1, 64, dtype='f4')), 'below 0'),
    'a group for a dataset': (
        lambda f: (f.__delitem__(f'model_weights/{BIAS}'), f.create_group(f'model_weights/{BIAS}')),
        'dense_1',
    ),
    'a weight for a layer': (lambda f: replaced(f, 'dense_1/dense_1', data=np.zeros((2, 2), 'f4')), 'not a layer'),
    'a weight for all layers': (
        lambda f: (f.__delitem__('model_weights'), f.create_dataset('model_weights', data=np.zeros((2, 2), 'f4'))),
        'not in layers',
    ),
    'missing layer': (lambda f: f.__delitem__('model_weights/conv2d_3'), 'missing'),
    'missing classifier': (lambda f: f.__delitem__('model_weights/dense_1'), 'does not hold'),
    'another layer': (lambda f: f.create_group('model_weights/lambda_1'), 'lambda_1'),
    'another layer whose name is no text': (lambda f: f.create_group(b'model_weights/\xff\xfe'), 'layers that'),
    'no label table': (lambda f: f.attrs.__delitem__('offline_hccr'), 'no label table'),
    'pickled label table': (lambda f: f.attrs.__setitem__('offline_hccr', np.void(b'\x80\x04N.')), 'description'),
    'an array for a label table': (lambda f: f.attrs.__setitem__('offline_hccr', ['{}', '{}']), 'description'),
    'a book for a label table': (lambda f: f.attrs.__setitem__('offline_hccr', ' ' * 2**21), 'description'),
    'a list for a label table': (list_for_text, 'not a text'),
    'a number for a label table': (lambda f: f.attrs.__setitem__('offline_hccr', 1.0), 'description'),
    'a label table nested deeply': (lambda f: f.attrs.__setitem__('offline_hccr', '[' * 60_000), 'description'),
    'too few labels': (lambda f: described(f, labels='一二'), '2 labels'),
    'a label twice': (lambda f: described(f, labels='一一二三人'), 'twice'),
    'labels that are numbers': (lambda f: described(f, labels=[1, 2, 3, 4, 5]), 'one character'),
    'infinite temperature': (lambda f: described(f, temperature=float('inf')), 'temperature'),
    'a temperature of next to nothing': (lambda f: described(f, temperature=1e-50), 'temperature'),
    'a temperature too low': (lambda f: described(f, temperature=9e-4), 'temperature'),
    'a temperature too high': (lambda f: described(f, temperature=1001.0), 'temperature'),
    'a temperature below 0': (lambda f: described(f, temperature=-1.0), 'temperature'),
    'huge input': (lambda f: described(f, input_shape=[10**6, 10**6, 1]), 'input_shape'),
    'another pooling': (lambda f: described(f, global_average_type='GAP'), 'described as GAP'),
    'unknown field': (lambda f: described(f, code='import os'), 'description'),
    'newer format': (lambda f: described(f, format=2), 'newer version'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_files_are_refused(tmp_path, small_file, case):
    edit, reason = HOSTILE[case]
    path = change(tmp_path / 'a.h5', small_file, edit)
    with pytest.raises(ModelFileError, match=reason) as refusal:
        load_model(path)
    assert str(path) in str(refusal.value)


def test_a_text_that_is_said_to_be_a_list_does_not_crash_the_library(tmp_path, small_file):
    """Found by fuzzing: HDF5 1.14.6 ends the process with a segmentation fault when it reads this."""
    data = bytearray(small_file.read_bytes())
    # The type of the description: class 9, a list of variable length; 1 says of text, 11 of nothing that there is.
    place = data.index(b'offline_hccr\0\0\0\0\x19\x01') + 17
    data[place] = 0xAB
    (tmp_path / 'a.h5').write_bytes(data)
    with pytest.raises(ModelFileError, match='not a text'):
        load_model(tmp_path / 'a.h5')


@pytest.mark.parametrize('libver', ['earliest', 'latest'])
def test_a_text_that_is_said_to_be_long_takes_no_memory(tmp_path, libver):
    """Found by fuzzing: HDF5 takes the gigabytes that 20 KB speak of before it looks for them."""
    path, text = tmp_path / 'a.h5', 'x' * 1234
    with h5py.File(path, 'w', libver=libver) as file:
        file.attrs['offline_hccr'] = text
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack('<I', len(text)), data.index(b'offline_hccr'))
    data[place : place + 4] = struct.pack('<I', 2**31)
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match='too long'):
        load_model(path)


def repeated_label_table(path, small_file):
    """A description that is an array of 2,000 texts, all of them the same megabyte of the file."""
    text = 'z' * 2**20

    def edit(file):
        file.attrs['offline_hccr'] = [text, *['x'] * 1999]

    data = bytearray(change(path, small_file, edit).read_bytes())
    # References to the texts, 16 bytes each: its length, the address of its heap, its number there.
    place = re.search(re.escape(struct.pack('<I', len(text))) + rb'.{12}\x01\x00\x00\x00', data, re.DOTALL).start()
    data[place : place + 16 * 2000] = data[place : place + 16] * 2000
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ('number', 'size'), [(0, 0), (0, 8), (1, 2**64 - 16), (1, 2**40)], ids=['empty', 'short', 'wraps', 'beyond']
)
def test_a_heap_of_texts_without_an_end_is_refused(tmp_path, number, size):
    """The HDF5 library would go round in it for ever."""
    path = tmp_path / 'a.h5'
    with h5py.File(path, 'w') as file:
        file.attrs['offline_hccr'] = 'a text of its own'
    data = bytearray(path.read_bytes())
    place = data.index(b'GCOL') + 16
    data[place : place + 16] = struct.pack('<H6xQ', number, size)
    path.write_bytes(data)

    def read():
        with model_file.opened(path):
            pass

    with pytest.raises(ModelFileError, match='heap of texts'):
        read()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='what a process takes is measured otherwise there')
def test_bombs_take_no_memory(tmp_path, small_file):
    paths = [
        change(tmp_path / f'{number}.h5', small_file, HOSTILE[case][0])
        for number, case in enumerate(case for case in HOSTILE if 'bomb' in case or 'nested' in case)
    ]
    paths.append(repeated_label_table(tmp_path / 'repeated.h5', small_file))
    code = """if True:
        import resource, sys, model_file
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sys.argv[1:]:
            try:
                with model_file.opened(path) as file:
                    file.weight('dense_1', 'bias', (5,))
                    file.weight('conv2d_2', 'kernel', (3, 3, 64, 64))
            except model_file.ModelFileError as error:
                print(error.reason)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(grown * (1 if sys.platform == 'darwin' else 1024))
    """
    done = subprocess.run([sys.executable, '-c', code, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    *reasons, grown = done.stdout.splitlines()
    assert len(reasons) == len(paths), done.stdout
    assert int(grown) < 64e6


def test_a_swapped_table_of_3755_labels_is_refused(tmp_path):
    def swap(file):
        described(file, labels=''.join((LABELS[1], LABELS[0], *LABELS[2:])))

    with pytest.raises(ModelFileError, match='class order'):
        load_model(change(tmp_path / 'a.h5', ROOT / 'melnyk_net.h5', swap))


@pytest.mark.parametrize(
    ('content', 'reason'),
    [(b'', 'not an HDF5'), (b'text', 'not an HDF5'), (b'\x89HDF\r\n\x1a\n' + bytes(500), 'damaged')],
)
def test_what_is_no_model_file_is_refused(tmp_path, content, reason):
    (tmp_path / 'a.h5').write_bytes(content)
    with pytest.raises(ModelFileError, match=reason):
        load_model(tmp_path / 'a.h5')


def test_truncated_missing_and_special_files_are_refused(tmp_path, small_file):
    (tmp_path / 'a.h5').write_bytes(small_file.read_bytes()[:100_000])
    with pytest.raises(ModelFileError, match='damaged'):
        load_model(tmp_path / 'a.h5')
    with pytest.raises(FileNotFoundError, match='no such model file'):
        load_model(tmp_path / 'b.h5')
    with pytest.raises(ModelFileError, match='not a regular file'):
        load_model(tmp_path)


def test_a_lambda_layer_is_refused_and_never_run(tmp_path):
    marker = tmp_path / 'marker'
    image = keras.Input((96, 96, 1), name='input_1')
    x = keras.layers.Lambda(lambda x, path=str(marker): (open(path, 'w').close(), x)[1], name='lambda_1')(image)
    x = keras.layers.GlobalAveragePooling2D(name='global_average_pooling2d_1')(x)
    x = keras.layers.Dense(5, name='dense_1')(x)
    keras.Model(image, x).save(tmp_path / 'a.h5')
    marker.unlink()
    with pytest.raises(ModelFileError):
        load_model(tmp_path / 'a.h5')
    assert not marker.exists()
