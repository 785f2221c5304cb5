import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import benchmark
from benchmark import MULTIPLICATIONS, QUICK, BenchmarkError, Row, in_process, main, medians, often, table_line


@pytest.mark.parametrize(
    ('row', 'share', 'line'),
    [
        (Row('folder', 'PNG', 5.5, 'ms', 5.0, 'alone'), 0.909, '90.9 % of 5 ms, alone'),
        (Row('reader', 'GNT', 2500, 'MB/s', 10_000, 'plain'), 0.25, '2,500 MB/s          25 % of 10,000 MB/s, plain'),
        (Row('network', 'own', 3.5, 'ms'), None, '3.5 ms'),
        (Row('network', 'x.tflite', None, limit_is='not\x1b there'), None, 'not measured: not\\x1b there'),
    ],
)
def test_a_line_says_what_share_of_the_limit_is_reached(row, share, line):
    assert row.share == (None if share is None else pytest.approx(share, abs=1e-3))
    assert table_line(row).endswith(line)


def test_medians_take_turns_and_leave_the_first_out():
    order = []
    times = medians(2, lambda: order.append('a'), often(lambda: order.append('b'), 2), clock=iter(range(99)).__next__)
    assert order == ['a', 'b', 'b'] * 3
    assert times == [1, 1]


def test_scans_are_tight_and_have_the_size_of_samples():
    for scan in benchmark.scans(30):
        assert 55 <= max(scan.shape) <= 120
        ink = scan < 255
        assert ink.any(axis=0)[[0, -1]].all()
        assert ink.any(axis=1)[[0, -1]].all()
    assert len({scan.shape for scan in benchmark.scans(30)}) > 10


def test_the_photo_is_one_of_a_page():
    picture = benchmark.photo(benchmark.characters()[0][1], 400)
    assert picture.shape == (300, 400, 3)
    left, right = picture[:, :20].mean(), picture[:, -20:].mean()
    assert left > 1.4 * right  # lit from one side
    assert picture[..., 0].mean() > picture[..., 2].mean()  # yellowish


def test_the_gnt_file_can_be_read(tmp_path):
    from gnt_reader import read_gnt

    benchmark.write_gnt(tmp_path / 'a.gnt', 50)
    records = list(read_gnt(tmp_path / 'a.gnt'))
    assert len(records) == 50
    assert records[0].character == benchmark.LABELS[0]


@pytest.mark.parametrize('name', MULTIPLICATIONS)
def test_multiplications_are_those_of_the_network(name):
    from melnyk_net import ARCHITECTURES

    count = 0
    for layer in ARCHITECTURES[name]().layers:
        kind = type(layer).__name__
        if kind in ('Conv2D', 'DepthwiseConv2D'):
            count += np.prod(layer.output.shape[1:3]) * np.prod(layer.kernel.shape)
        elif kind == 'Dense':
            count += np.prod(layer.kernel.shape)
    assert MULTIPLICATIONS[name] == count


def test_the_network_is_measured(small_file):
    found = benchmark.measure_network(str(small_file), 'float32', (1, 2), repeats=1, product=64)
    assert found['architecture'] == 'melnyk_net'
    assert found['precision'] == found['product'] == 'float32'
    assert found['flops'] > 0
    assert len(found['ms']) == 2
    assert all(ms > 0 for ms in found['ms'])


def test_a_folder_is_measured(small_file):
    found = benchmark.measure_folder(str(small_file), files=3, repeats=1)
    assert found['ms'] > 0
    assert found['limit'] > 0


def test_training_is_measured():
    import keras

    effort = {**vars(QUICK), 'records': 12, 'batch_size': 2, 'steps': 1}
    try:
        step, supply = benchmark.measure_training(effort, 'mobilenet_v3_small', None)
    finally:
        keras.config.set_dtype_policy('float32')  # a run has its own, and has this process to itself
    assert (step['unit'], supply['unit']) == ('ms', 'samples/s')
    assert all(row['value'] > 0 and row['limit'] > 0 for row in (step, supply))


def test_peers_are_measured_where_they_work(small_file, monkeypatch):
    def not_installed():
        raise ImportError('no such module')

    def broken():
        def recognise(picture):
            raise RuntimeError('the program is not there\nmore of it')

        return recognise

    peers = {'good': lambda: lambda picture: '永\n', 'missing': not_installed, 'broken': broken}
    monkeypatch.setattr(benchmark, 'PEERS', peers)
    ours, good, bad = benchmark.measure_peers(str(small_file), repeats=1)
    assert (ours['what'], good['what']) == ('this program', 'good')
    assert good['right'] == 1
    assert good['of'] == len(benchmark.characters())
    assert bad == {'what': 'broken', 'error': 'broken: the program is not there'}


def test_other_recognisers_get_a_picture_and_give_a_text(monkeypatch):
    class Engine:
        def __call__(self, picture, use_det, use_cls, use_rec):
            assert (use_det, use_cls, use_rec) == (False, False, True)
            assert picture.shape == (9, 9, 3)
            return self.answer

    class New(Engine):
        answer = type('Output', (), {'txts': ('鲍',)})

    class Old(Engine):
        answer = [['鲍', 0.9]], [0.1]

    def text(picture, lang, config):
        assert isinstance(picture, Image.Image)
        assert (lang, config) == ('chi_sim', '--psm 10')
        return '鲍'

    for module, content in (
        ('rapidocr', {'RapidOCR': New}),
        ('rapidocr_onnxruntime', {'RapidOCR': Old}),
        ('pytesseract', {'image_to_string': staticmethod(text)}),
    ):
        monkeypatch.setitem(sys.modules, module, type(module, (), content))
    for name, make in benchmark.PEERS.items():
        assert make()(np.zeros((9, 9, 3), np.uint8)) == '鲍', name


def test_a_task_has_a_process_of_its_own():
    rows = in_process('preparation', 1, side=700, repeats=1)['rows']
    assert len(rows) == 6
    assert all(row['ms'] > 0 and row['limit'] > 0 for row in rows)


@pytest.mark.parametrize(
    ('task', 'arguments', 'reason'),
    [
        ('folder', {'model': 'nowhere.h5', 'files': 1, 'repeats': 1}, 'nowhere.h5'),
        ('preparation', {}, 'missing'),
        ('unheard of', {}, 'unheard of'),
    ],
)
def test_a_task_that_fails_says_why(capsys, task, arguments, reason):
    assert main(['--task', json.dumps([task, arguments])]) == 1
    assert reason in json.loads(capsys.readouterr().out)['error']


def test_what_cannot_be_measured_has_a_line_and_stops_nothing(tmp_path, capsys, monkeypatch):
    def none(task, cores, **arguments):
        raise BenchmarkError('no such runtime')

    monkeypatch.setattr(benchmark, 'in_process', none)
    file = tmp_path / 'figures.json'
    options = ['--quick', '--only', 'network', 'preparation', 'reader', '--model', 'a.tflite', 'b.h5']
    assert main([*options, '--json', str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum('not measured: no such runtime' in line for line in lines) == 3
    content = json.loads(file.read_text(encoding='utf-8'))
    assert content['machine']['cores'] >= 1
    assert content['quick'] is True
    sections = [row['section'] for row in content['rows']]
    assert sections == ['network', 'network', 'preparation', 'reader', 'reader']
    assert content['rows'][-1]['share'] > 0
    assert content['rows'][0]['value'] is None


def test_without_a_name_the_shipped_models_are_measured(tmp_path, monkeypatch, capsys):
    for name in ('b.tflite', 'melnyk_net.h5', 'a.h5', '.a.part.h5', 'note.txt'):
        (tmp_path / name).touch()
    monkeypatch.setattr(benchmark, 'HERE', tmp_path)
    monkeypatch.setattr(benchmark, 'default_model', lambda: tmp_path / 'melnyk_net.h5')
    names = [Path(path).name for path in benchmark.shipped_models()]
    assert names == ['melnyk_net.h5', 'a.h5', 'b.tflite']
    monkeypatch.setattr(benchmark, 'HERE', tmp_path / 'nowhere')
    assert main([]) == 1
    assert '--model' in capsys.readouterr().err


def test_nothing_measured_is_an_error(capsys, monkeypatch):
    monkeypatch.setitem(benchmark.ROWS, 'network', lambda options, effort: iter([Row('network', 'a', None)]))
    assert main(['--only', 'network', '--model', 'a.h5']) == 1


@pytest.mark.parametrize('options', [['--only', 'nothing'], ['--only'], ['--unheard']])
def test_wrong_usage(options):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2
