"""The harnesses of fuzz.py for a moment, and what they have found."""

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_utils
import gnt_reader
import model_file

EXAMPLES = {'gnt': 300, 'image': 100, 'model': 100, 'prompt': 150}


@pytest.mark.parametrize('name', fuzz.HARNESSES)
def test_any_bytes_give_what_is_promised(name):
    harness, seeds = fuzz.HARNESSES[name]
    mutations = st.builds(fuzz.mutated, st.sampled_from(seeds()), st.integers(0, 2**32))

    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(mutations, mutations, st.binary(max_size=100)))
    def run(data):
        harness(data)

    for seed in seeds():
        harness(seed)
    run()


def test_the_seeds_are_good_files(tmp_path, monkeypatch):
    """Mutations of what is refused at once would reach nothing."""
    path = tmp_path / 'seed'
    for seed in fuzz.gnt_seeds()[:2]:
        path.write_bytes(seed)
        assert len(list(gnt_reader.read_gnt(path, level1_only=False))) in (1, 3)
    for seed in fuzz.image_seeds()[1:]:
        path.write_bytes(seed)
        assert data_utils.open_image(path).shape[:2] in ((40, 40), (2, 3), (2, 2))

    import melnyk_net

    path.write_bytes(fuzz.model_seeds()[-1])
    assert model_file.read_tflite(path)[1].labels == ('一', '二')
    monkeypatch.setattr(melnyk_net, 'FILTER_GROUPS', fuzz.NARROW)
    for seed in fuzz.model_seeds()[2:-1]:
        path.write_bytes(seed)
        model, info = melnyk_net.load_model(path)
        assert (info.labels, model.input_shape) == (('一', '二'), (None, 8, 8, 1))


BROKEN = {
    'gnt': (gnt_reader, 'HEADER', 'not a header'),
    'image': (data_utils, 'otsu_threshold', lambda gray: 1 / 0),
    'model': (model_file, 'POOLING_NAMES', None),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_promise_is_found(name, monkeypatch):
    """A harness that lets everything pass would say nothing."""
    module, attribute, value = BROKEN[name]
    harness, make_seeds = fuzz.HARNESSES[name]
    seeds = make_seeds()
    monkeypatch.setattr(module, attribute, value)

    def run():
        for seed in seeds:
            harness(seed)

    with pytest.raises((fuzz.Finding, AttributeError, ZeroDivisionError, TypeError)):
        run()


def test_the_documented_command_runs_ends_and_keeps_what_it_finds(tmp_path, capsys, monkeypatch):
    assert fuzz.run(['prompt', '--seconds', '0.1', '--folder', str(tmp_path)]) == 0
    assert 'inputs in' in capsys.readouterr().err
    assert not list(tmp_path.glob('crash*'))

    monkeypatch.setattr(fuzz.main, 'parse_yes', lambda answer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuzz.run(['prompt', '--folder', str(tmp_path)])
    (crasher,) = tmp_path.glob('crash*')
    with pytest.raises(ZeroDivisionError):
        fuzz.run(['prompt', str(crasher)])

    with pytest.raises(SystemExit):
        fuzz.run(['--help'])
    help_ = capsys.readouterr().out
    assert all(f'python tests/fuzz.py {name}' in help_ for name in fuzz.HARNESSES)
