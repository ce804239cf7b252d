"""Does anything that goes wrong inside the model leave something behind? And do threads that share a wrapper disturb each other?"""

import ast
import collections
import contextlib
import gc
import itertools
import sys
import threading
import weakref
from pathlib import Path

import k_diffusion as K
import pytest
import torch
from torch import nn

import ksag
from ksag import cfg
from tests.models import Around, Unknown, inputs, randomise


class Guidable(nn.Module):
    """A stand-in for a denoiser with an attention of no family, which is read through scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = Around("mine", Unknown(32))
        self.condition = nn.Linear(10, 3)
        self.eval().requires_grad_(False)

    def forward(self, x, sigma, mapping_cond):
        return self.unet(x + self.condition(mapping_cond)[:, :, None, None]) / sigma[:, None, None, None]


def small_denoiser():
    torch.manual_seed(0)
    unet = K.models.ImageDenoiserModelV1(3, 16, [1], [64], [True], mapping_cond_dim=10)
    return K.layers.Denoiser(randomise(unet), sigma_data=0.5)


MODELS = {"a known family": (small_denoiser, "middle"), "no known family": (Guidable, "mine")}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def wrap(kind, inner_model=None, **options):
    build, attention = MODELS[kind]
    options = {"attention": attention, "cond_key": "mapping_cond", "blur_kernel_size": 5, **options}
    return ksag.SAGDenoiser(inner_model or build(), **options)


def call(guided, sigma=3.0, **options):
    x, sigma, cond, uncond = inputs(1, (8, 12), sigma)
    return guided(x, sigma, **{"cond": cond, "uncond": uncond, "cond_scale": 2.0, **options})


# Errors in every module, at each end of it


class Fault(Exception):
    pass


def raises(error):
    def hook(*args):
        raise error

    return hook


PLACES = {
    "before its hooks": lambda module, hook: module.register_forward_pre_hook(hook, prepend=True),
    "before its forward": lambda module, hook: module.register_forward_pre_hook(hook),
    "after its forward": lambda module, hook: module.register_forward_hook(hook, prepend=True),
    "after its hooks": lambda module, hook: module.register_forward_hook(hook),
}


@contextlib.contextmanager
def hooked(place, module, hook):
    handle = PLACES[place](module, hook)
    try:
        yield
    finally:
        handle.remove()


class Alive:
    """The memory that modules computed into, for as long as anything holds it."""

    def __init__(self, layer):
        self.storages = []
        self.handles = [module.register_forward_hook(self.watch, prepend=True) for module in layer.modules()]

    def watch(self, module, args, output):
        self.storages.append(weakref.ref(output.untyped_storage()))

    def close(self):
        for handle in self.handles:
            handle.remove()

    def count(self):
        if any(storage() is not None for storage in self.storages):
            gc.collect()
        return sum(storage() is not None for storage in self.storages)


def failing_call(guided, error, **options):
    """Whether the error came, and out of the call as it was; nothing of it is kept."""
    try:
        call(guided, **options)
    except BaseException as caught:
        assert caught is error, repr(caught)
        caught.__traceback__ = None
        return True
    return False


def assert_nothing_is_left(guided):
    assert torch.overrides._get_current_function_mode() is None
    assert guided.tap._recording.get() is None


def reached(guided):
    """The modules that run while the wrapper is called, by name."""
    ran = set()
    names = {name: module for name, module in guided.inner_model.named_modules()}
    handles = [module.register_forward_pre_hook(lambda module, args: ran.add(module)) for module in names.values()]
    call(guided)
    for handle in handles:
        handle.remove()
    return {name: module for name, module in names.items() if module in ran}


ERRORS = [Fault, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration]


def faults(guided):
    """(module, place, error), the errors in turn: three of them in and around the layer, and one elsewhere."""
    around = {*guided.tap._around, *guided.tap.layer.modules()}
    errors = itertools.cycle(ERRORS)
    for name, module in reached(guided).items():
        for place in PLACES:
            for _ in range(3 if module in around else 1):
                yield name, module, place, next(errors)()


@pytest.mark.parametrize("at_first", [True, False])
def test_an_error_in_any_module_leaves_nothing(kind, at_first):
    """In each module, at four places: at the first call of a wrapper, which checks what it reads, or at a later one."""
    inner_model = MODELS[kind][0]()
    with wrap(kind, inner_model, cfg_rule=cfg.apg(momentum=-0.5)) as fresh:
        expected = call(fresh, sigma=2.0)
        call(fresh, sigma=3.0)
        assert not same(call(fresh, sigma=2.0), expected)  # the momentum of a run
        layer, cases = fresh.tap.layer, list(faults(fresh))
    assert len(cases) > 50
    alive = Alive(layer)
    guided = wrap(kind, inner_model, cfg_rule=cfg.apg(momentum=-0.5))
    for name, module, place, error in cases:
        if at_first:
            guided.close()
            guided = wrap(kind, inner_model, cfg_rule=cfg.apg(momentum=-0.5))
        else:
            call(guided, sigma=3.0)
        alive.storages.clear()
        with hooked(place, module, raises(error)):
            assert failing_call(guided, error, sigma=2.0), name
        assert_nothing_is_left(guided)
        assert alive.count() == 0, f"{name}, {place}"
        assert torch.equal(call(guided, sigma=2.0), expected), f"{name}, {place}"
        guided.reset()
    alive.close()


def test_an_error_in_the_last_pass_leaves_nothing(kind):
    error = Fault()
    with wrap(kind, cfg_rule=cfg.apg(momentum=-0.5)) as guided:
        expected = call(guided, sigma=2.0)
        for at_pass in 1, 2:
            guided.reset()
            call(guided, sigma=3.0)
            passes = iter(range(1, 3))

            def fails(module, args, passes=passes, at_pass=at_pass, error=error):
                if next(passes) == at_pass:
                    raise error

            with hooked("before its forward", guided.inner_model, fails), pytest.raises(Fault):
                call(guided, sigma=2.0)
            assert_nothing_is_left(guided)
            assert torch.equal(call(guided, sigma=2.0), expected)


def test_an_error_in_the_rule_leaves_nothing(kind):
    error = Fault()
    with wrap(kind) as guided:
        expected = call(guided)
        guided.cfg_rule = raises(error)
        assert failing_call(guided, error)
        assert_nothing_is_left(guided)
        guided.cfg_rule = cfg.plain
        assert torch.equal(call(guided), expected)


def test_an_error_inside_a_trace_leaves_no_half_step(kind):
    error = Fault()
    with wrap(kind) as guided, guided.trace() as steps:
        call(guided)
        with hooked("after its forward", guided.tap.layer, raises(error)):
            assert failing_call(guided, error)
        call(guided)
    assert len(steps) == 2 and all(map(torch.equal, steps[0], steps[1]))


def test_a_model_that_catches_the_error_and_runs_the_layer_again_is_read_right(kind):
    """As a model does that falls back to smaller pieces where memory runs out."""
    guided = wrap(kind)
    expected = call(wrap(kind))
    layer, forward, fails = guided.tap.layer, guided.tap.layer.forward, [True]

    def tries_twice(*args, **kwargs):
        if fails.pop() if fails else False:
            forward(*args, **kwargs)
            raise torch.OutOfMemoryError
        return forward(*args, **kwargs)

    parent = guided.inner_model.get_submodule(guided.tap.path.rpartition(".")[0])
    again = parent.forward

    def catches(*args, **kwargs):
        try:
            return again(*args, **kwargs)
        except torch.OutOfMemoryError:
            return again(*args, **kwargs)

    layer.forward, parent.forward = tries_twice, catches
    assert torch.equal(call(guided), expected)
    assert_nothing_is_left(guided)


# Ctrl-C between any two lines of ksag


@contextlib.contextmanager
def before_each_line(do):
    """Calls `do(place, n)` before a line of ksag runs for the n-th time, at a place (file, line)."""
    counts = collections.Counter()

    def trace(frame, event, arg):
        if "/ksag/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            place = frame.f_code.co_filename, frame.f_lineno
            counts[place] += 1
            do(place, counts[place])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield counts
    finally:
        sys.settrace(before)


def cleans_up(place):
    """Whether a line is itself what cleans up: no Python code is safe from Ctrl-C in the middle of that."""
    file, line = place
    blocks = []
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.Try) and node.finalbody:
            blocks.append(node.finalbody)
        if isinstance(node, ast.FunctionDef) and node.name in ("stop", "close", "set"):
            blocks.append(node.body)
    return any(block[0].lineno <= line <= block[-1].end_lineno for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a known family", "no known family"])
@pytest.mark.parametrize("at_first", [True, False])
def test_an_interrupt_before_any_line_leaves_nothing(kind, at_first):
    """Before the first time that a line runs in a wrapper's first call, and before the last time in a later one."""
    inner_model = MODELS[kind][0]()
    with wrap(kind, inner_model) as guided:
        if not at_first:
            call(guided)
        with before_each_line(lambda place, n: None) as lines:
            expected = call(guided)
    assert len(lines) > 100
    left = []
    for place, times in lines.items():
        raised = KeyboardInterrupt()

        def interrupt(now, n, place=place, when=1 if at_first else times, raised=raised):
            if (now, n) == (place, when):
                raise raised

        with wrap(kind, inner_model) as guided:
            if not at_first:
                call(guided)
            try:
                with before_each_line(interrupt):
                    assert failing_call(guided, raised)
                if not cleans_up(place):
                    assert_nothing_is_left(guided)
                while torch.overrides._get_current_function_mode() is not None:
                    torch.overrides._pop_mode()
                assert torch.equal(call(guided), expected)
                assert_nothing_is_left(guided)
            except (AssertionError, RuntimeError) as error:
                left.append(f"{place[0].rpartition('/ksag/')[2]}:{place[1]}: {str(error).splitlines()[0]}")
            while torch.overrides._get_current_function_mode() is not None:
                torch.overrides._pop_mode()
    assert not left, "\n".join(left)


# A model that calls the wrapper


class CallsItsWrapper(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner_model = MODELS[kind][0]()
        self.calls = []

    def forward(self, x, sigma, mapping_cond):
        if self.calls:
            return self.calls[0](x, sigma, cond=mapping_cond)
        return self.inner_model(x, sigma, mapping_cond=mapping_cond)


@pytest.mark.parametrize("at_first", [True, False])
@pytest.mark.parametrize("sag_scale", [0.5, 0.0])
def test_a_model_that_calls_its_wrapper_is_a_clear_error(kind, at_first, sag_scale):
    inner_model = CallsItsWrapper(kind)
    guided = wrap(kind, inner_model)
    expected = call(wrap(kind, CallsItsWrapper(kind)))
    if not at_first:
        call(guided)
    inner_model.calls.append(guided)
    with pytest.raises(RuntimeError, match="called from inside its own inner_model"):
        call(guided, sag_scale=sag_scale)
    assert_nothing_is_left(guided)
    inner_model.calls.clear()
    assert torch.equal(call(guided), expected)


def test_a_wrapper_around_a_wrapper_is_two_guidances(kind):
    """Not from inside: each asks what is inside it."""
    inner = wrap(kind)
    outer = wrap(kind, Renames(inner), attention=inner.tap.path)
    first, again = call(outer), call(outer)
    with wrap(kind) as once:
        assert not same(first, call(once))
    assert torch.equal(first, again)
    assert_nothing_is_left(inner)
    assert_nothing_is_left(outer)


class Renames(nn.Module):
    def __init__(self, guided):
        super().__init__()
        self.guided = guided

    def forward(self, x, sigma, mapping_cond):
        return self.guided(x, sigma, cond=mapping_cond)


# Threads


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def hectic():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


THREADS, IMAGES = 6, 20


def latent(i):
    """x, and options, of the i-th image: each has content, a sigma and a scale of its own."""
    generator = torch.Generator().manual_seed(i)
    x, sigma, cond, uncond = inputs(1, (8, 12), sigma=1.0 + i % 3)
    x, cond = torch.randn(x.shape, generator=generator) * 3, torch.randn(cond.shape, generator=generator)
    return x, sigma, {"cond": cond, "uncond": uncond, "cond_scale": 2.0, "sag_scale": 1.0 + i % 2}


def image(guided, i):
    x, sigma, options = latent(i)
    with torch.no_grad():
        return guided(x, sigma, **options)


def in_threads(*works):
    """Runs them at once, begun together, and raises what the first one that failed raised."""
    errors = []
    begin = threading.Barrier(len(works))

    def run(work):
        try:
            begin.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def same(actual, expected):
    """As alone: a thread may split its sums in another way, which is rounding."""
    return (actual - expected).norm() < 1e-5 * expected.norm()


def assert_the_images_are_told_apart(expected, guided):
    for i, result in enumerate(expected):
        assert not same(result, expected[i - 1]) and not same(image_unguided(guided, i), result)


def image_unguided(guided, i):
    x, sigma, options = latent(i)
    return guided(x, sigma, **{**options, "sag_scale": 0.0})


@pytest.mark.parametrize(
    ("backend", "checked"), [(None, False), (None, True), ("eager", False), ("eager", True), ("aot_eager", False)]
)
def test_threads_that_share_a_wrapper_get_each_its_own_image(backend, checked, fresh_dynamo, hectic):
    """120 images, from threads that begin with the wrapper's first call, which checks what is read, or after it."""
    guided = wrap("a known family")
    with wrap("a known family") as alone:
        expected = [image(alone, i) for i in range(IMAGES)]
        assert_the_images_are_told_apart(expected[:6], alone)
    if backend is not None:
        guided.inner_model.inner_model = torch.compile(guided.inner_model.inner_model, backend=backend)
    if checked:
        image(guided, 0)
    wrong = []

    def work(first):
        for n in range(IMAGES):
            i = (first * 7 + n) % IMAGES
            if not same(image(guided, i), expected[i]):
                wrong.append(i)

    in_threads(*[lambda first=first: work(first) for first in range(THREADS)])
    assert not wrong, f"{len(wrong)} of {THREADS * IMAGES} images are wrong"
    assert_nothing_is_left(guided)


@pytest.mark.parametrize("checked", [True, False])
def test_threads_that_share_a_wrapper_of_an_unknown_family(checked, hectic):
    guided = wrap("no known family")
    with wrap("no known family") as alone:
        expected = [image(alone, i) for i in range(IMAGES)]
        assert_the_images_are_told_apart(expected[:6], alone)
    if checked:
        image(guided, 0)
    wrong = []

    def work(first):
        for i in range(first % 2, IMAGES, 2):
            if not same(image(guided, i), expected[i]):
                wrong.append(i)
        assert torch.overrides._get_current_function_mode() is None

    in_threads(*[lambda first=first: work(first) for first in range(THREADS)])
    assert not wrong
    assert_nothing_is_left(guided)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_two_wrappers_on_one_model_in_two_threads(backend, fresh_dynamo, hectic):
    inner_model = small_denoiser()
    first, last = (layer.path for layer in ksag.list_attention(inner_model))
    guided = [wrap("a known family", inner_model, attention=path) for path in (first, last)]
    expected = [[image(one, i) for i in range(IMAGES)] for one in guided]
    assert not same(expected[0][0], expected[1][0])
    if backend is not None:
        compiled = torch.compile(inner_model.inner_model, backend=backend)
        inner_model.inner_model = compiled
    wrong = []

    def work(one, alone):
        for i in range(IMAGES):
            if not same(image(one, i), alone[i]):
                wrong.append(i)

    in_threads(
        *[lambda one=one, alone=alone: work(one, alone) for one, alone in zip(guided, expected, strict=True) for _ in range(2)]
    )
    assert not wrong, f"{len(wrong)} images are wrong"


@pytest.mark.parametrize("backend", [None, "eager"])
def test_errors_in_one_thread_do_not_disturb_the_others(backend, fresh_dynamo, hectic):
    guided = wrap("a known family", cfg_rule=cfg.apg(momentum=-0.5))
    with wrap("a known family") as alone:
        expected = []
        for i in range(IMAGES):
            alone.cfg_rule = cfg.apg(momentum=-0.5)
            expected.append(image(alone, i))
    if backend is not None:
        guided.inner_model.inner_model = torch.compile(guided.inner_model.inner_model, backend=backend)
    image(guided, 0)
    guided.reset()
    wrong, failures = [], []

    def works():
        for i in range(IMAGES):
            guided.reset()
            if not same(image(guided, i), expected[i]):
                wrong.append(i)

    def fails():
        for i in range(IMAGES):
            guided.reset()
            x, sigma, options = latent(i)
            try:
                guided(x, sigma, **options, unknown_keyword=1)
            except TypeError:
                failures.append(i)
            if not same(image(guided, i), expected[i]):
                wrong.append(i)

    in_threads(works, fails, works, fails)
    assert len(failures) == 2 * IMAGES and not wrong


def test_a_call_while_another_thread_compiles_waits_for_its_turn(fresh_dynamo):
    """PyTorch says that it compiles to every thread, also to those that run ksag as it is."""
    guided = wrap("a known family")
    expected = [image(guided, i) for i in range(2)]
    compiles, goes_on = threading.Event(), threading.Event()

    def backend(graph, example_inputs):
        compiles.set()
        assert goes_on.wait(60)
        return graph

    guided.inner_model.inner_model = torch.compile(guided.inner_model.inner_model, backend=backend)
    images = {}

    def first():
        images[0] = image(guided, 0)

    def second():
        assert compiles.wait(60)
        threading.Timer(0.5, goes_on.set).start()  # by then, the call below is under way
        images[1] = image(guided, 1)

    in_threads(first, second)
    assert same(images[0], expected[0]) and same(images[1], expected[1])


def test_a_thread_that_is_interrupted_leaves_the_turn_to_the_others(fresh_dynamo):
    """Ctrl-C while a thread has its turn with a compiled model, which the others wait for."""
    guided = wrap("a known family")
    expected = image(guided, 0)
    guided.inner_model.inner_model = torch.compile(guided.inner_model.inner_model, backend="eager")
    image(guided, 0)
    raised = KeyboardInterrupt()

    def interrupted():
        with hooked("before its forward", guided.inner_model, raises(raised)):
            assert failing_call(guided, raised)

    in_threads(interrupted)
    images = []
    in_threads(*[lambda: images.append(image(guided, 0))] * 2)
    assert len(images) == 2 and all(same(one, expected) for one in images)


def test_a_run_is_its_own_threads(hectic):
    """A rule's momentum, of threads that come one after another, and may have an id that was another's."""
    guided = wrap("a known family", cfg_rule=cfg.apg(momentum=-0.5))
    first = call(guided, sigma=3.0)
    expected = call(guided, sigma=2.0)
    runs = []

    def run():
        runs.append((call(guided, sigma=3.0), call(guided, sigma=2.0)))

    for _ in range(20):
        in_threads(run)
    assert not same(first, expected)
    assert all(same(begin, first) and same(end, expected) for begin, end in runs)
