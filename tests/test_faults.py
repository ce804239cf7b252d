"""Does anything that goes wrong inside the model leave something behind? And do threads that share a wrapper disturb each other?"""

import ast
import collections
import contextlib
import functools
import gc
import itertools
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import ksag
from ksag import cfg
from tests import forms, reference
from tests.models import Around, Unknown, hooks

gc.freeze()  # so that gc.collect() looks at what a test made, and not at all of PyTorch


class Guidable(nn.Module):
    """A denoiser with an attention of no family, which is read through scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = Around("mine", Unknown(32))
        self.condition = nn.Linear(4, 3)
        self.eval().requires_grad_(False)

    def forward(self, x, sigma, cond):
        return self.unet(x + self.condition(cond)[:, :, None, None]) / sigma[:, None, None, None]


KINDS = ["SAG and PAG", "a user's own", "no known family"]
"""Which between them have every kind of hook: they read, change, replace a module's output, or watch the layer's call."""


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make_model(kind):
    return Guidable() if kind == "no known family" else forms.tiny()


def wrap(kind, inner_model=None, **options):
    inner_model = inner_model or make_model(kind)
    if kind == "no known family":
        return ksag.SAGDenoiser(inner_model, attention="mine", blur_kernel_size=5, **options)
    return forms.wrap(kind, inner_model, **options)


def call(guided, sigma=3.0, **options):
    x, args = forms.latents(1)
    return guided(x * sigma, torch.full((1,), sigma), **{**args, **options})


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
    """The memory that the modules of some layers computed into, for as long as anything holds it."""

    def __init__(self, layers):
        self.storages = []
        modules = {module for layer in layers for module in layer.modules()}
        self.handles = [module.register_forward_hook(self.watch, prepend=True) for module in modules]

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
        assert error in (caught, caught.__cause__), repr(caught)  # a generator makes a RuntimeError of a StopIteration
        caught.__traceback__ = None
        return True
    return False


def assert_nothing_is_left(guided):
    assert torch.overrides._get_current_function_mode() is None
    assert all(tap._visit.get() is None for tap in guided._hooks.all)


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


def faults(guided, places=tuple(PLACES)):
    """(module, place, error), cycling through the errors."""
    errors, turns = itertools.cycle(ERRORS), itertools.cycle(PLACES)
    for name, module in reached(guided).items():
        for place in places or [next(turns)]:
            yield name, module, place, next(errors)()


def check_faults(kind, at_first, **options):
    inner_model = make_model(kind)
    rule = functools.partial(cfg.apg, momentum=-0.5)
    with wrap(kind, inner_model, cfg_rule=rule()) as fresh:
        expected = call(fresh, sigma=2.0)
        call(fresh, sigma=3.0)
        assert not same(call(fresh, sigma=2.0), expected)  # the momentum of a run
        layers, cases = [tap.layer for tap in fresh._hooks.attention], list(faults(fresh, **options))
    assert len(cases) >= 8
    alive = Alive(layers)
    guided = wrap(kind, inner_model, cfg_rule=rule())
    for name, module, place, error in cases:
        if at_first:
            guided.close()
            guided = wrap(kind, inner_model, cfg_rule=rule())
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


@pytest.mark.parametrize("at_first", [True, False])
def test_an_error_in_any_module_leaves_nothing(kind, at_first):
    """In each module, at four places: at the first call of a wrapper, which checks what it reads, or at a later one."""
    check_faults(kind, at_first)


@pytest.mark.parametrize("form", [form for form in forms.FORMS if form not in KINDS])
def test_an_error_leaves_nothing_in_any_form(form):
    """In each module, at one of the four places."""
    check_faults(form, at_first=False, places=())


@pytest.mark.parametrize("kind", ["SAG and PAG", "no known family"])
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
        once = len(steps)
        with hooked("after its forward", guided.inner_model, raises(error)):
            assert failing_call(guided, error)
        assert len(steps) == once == len(guided.directions)
        call(guided)
    assert reference.same_steps(steps[:once], steps[once:])


@pytest.mark.parametrize("kind", ["SAG and PAG", "no known family"])
def test_a_model_that_catches_the_error_and_runs_the_layer_again_is_read_right(kind):
    """As a model does that falls back to smaller pieces where memory runs out."""
    guided = wrap(kind)
    expected = call(wrap(kind))
    [tap] = guided._hooks.attention
    layer, forward, fails = tap.layer, tap.layer.forward, [True]

    def tries_twice(*args, **kwargs):
        if fails.pop() if fails else False:
            forward(*args, **kwargs)
            raise torch.OutOfMemoryError
        return forward(*args, **kwargs)

    parent = guided.inner_model.get_submodule(tap.path.rpartition(".")[0])
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
        if isinstance(node, ast.FunctionDef) and node.name in ("stop", "close", "set", "end"):
            blocks.append(node.body)
    return any(block[0].lineno <= line <= block[-1].end_lineno for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("at_first", [True, False])
def test_an_interrupt_before_any_line_leaves_nothing(kind, at_first):
    """Before the first time that a line runs in a wrapper's first call, and before the last time in a later one."""
    inner_model = make_model(kind)
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
        self.inner_model = make_model(kind)
        self.calls = []

    def forward(self, x, sigma, cond):
        if self.calls:
            return self.calls[0](x, sigma, cond=cond)
        return self.inner_model(x, sigma, cond=cond)


@pytest.mark.parametrize("at_first", [True, False])
def test_a_model_that_calls_its_wrapper_is_an_error_and_leaves_nothing(at_first):
    inner_model = CallsItsWrapper("SAG")
    guided = ksag.SAGDenoiser(inner_model, blur_kernel_size=5)
    expected = call(ksag.SAGDenoiser(CallsItsWrapper("SAG"), blur_kernel_size=5))
    if not at_first:
        call(guided)
    inner_model.calls.append(guided)
    for options in {}, {"sag_scale": 0.0}:
        with pytest.raises(RecursionError):
            call(guided, **options)
        assert_nothing_is_left(guided)
    inner_model.calls.clear()
    assert torch.equal(call(guided), expected)


def test_a_wrapper_around_a_wrapper_is_a_clear_error(kind):
    inner = wrap(kind)
    before = hooks(inner.inner_model)
    for around in inner, nn.Sequential(inner):
        with pytest.raises(TypeError, match=r"holds a (Guided|SAG)Denoiser, which does classifier-free guidance.*guided twice"):
            ksag.GuidedDenoiser(around, ksag.PAG())
    assert hooks(inner.inner_model) == before


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


THREADS, IMAGES = 4, 6


def image(guided, i, **options):
    """Two calls of a run. Each image has its own content, sigmas and guidance scale."""
    x, args = forms.latents(1, seed=i)
    args |= {"cond_scale": 1.0 + i % 3, **options}
    guided.reset()
    with torch.no_grad():
        return torch.stack([guided(x * 3 * s, torch.full((1,), s * (2.0 + i % 2)), **args) for s in (1.0, 0.9)])


def alone(kind):
    """The images, one after another; each is guided, and is not any other."""
    with wrap(kind) as guided, ksag.GuidedDenoiser(guided.inner_model, []) as plain:
        images = [image(guided, i) for i in range(IMAGES)]
        for i in range(IMAGES):
            assert not same(images[i], images[i - 1]) and not same(image(plain, i), images[i])
    return images


def in_threads(*works):
    """Runs them concurrently, started together, and raises the first error."""
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


SHARED = ["SAG", "SAG in one pass, PAG and SEG", "a user's own", "no known family"]


@pytest.mark.parametrize(
    ("kind", "checked"),
    [*((kind, False) for kind in SHARED), *((kind, True) for kind in KINDS),
     *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in forms.FORMS if kind not in SHARED)],
)  # fmt: skip
def test_threads_that_share_a_wrapper_get_each_its_own_image(kind, checked, hectic):
    """From threads that begin with the wrapper's first call, which checks what is read, or after it."""
    check_threads(wrap(kind), alone(kind), checked)


@pytest.mark.parametrize(("kind", "backend", "checked"), [
    ("SAG in one pass, PAG and SEG", "eager", False),
    pytest.param("SAG in one pass, PAG and SEG", "eager", True, marks=pytest.mark.slow),
    pytest.param("a user's own", "eager", False, marks=pytest.mark.slow),
    pytest.param("SAG", "aot_eager", False, marks=pytest.mark.slow),
])  # fmt: skip
def test_threads_that_share_a_compiled_model_get_each_its_own_image(kind, backend, checked, fresh_dynamo, hectic):
    guided, expected = wrap(kind), alone(kind)
    guided.inner_model = torch.compile(guided.inner_model, backend=backend)
    check_threads(guided, expected, checked)


def check_threads(guided, expected, checked):
    if checked:
        image(guided, 0)
    wrong = []

    def work(first):
        for n in range(2 * IMAGES):
            i = (first * 7 + n) % IMAGES
            if not same(image(guided, i), expected[i]):
                wrong.append(i)
        assert torch.overrides._get_current_function_mode() is None

    in_threads(*[lambda first=first: work(first) for first in range(THREADS)])
    assert not wrong, f"{len(wrong)} of {2 * THREADS * IMAGES} images are wrong"
    assert_nothing_is_left(guided)


@pytest.mark.parametrize("backend", [None, pytest.param("eager", marks=pytest.mark.slow)])
def test_wrappers_on_one_model_in_several_threads(backend, fresh_dynamo, hectic):
    inner_model, kinds = forms.tiny(), ["SAG", "PAG on two layers", "a user's own"]
    guided, expected = [wrap(kind, inner_model) for kind in kinds], [alone(kind) for kind in kinds]
    assert not same(expected[0][0], expected[1][0])
    if backend is not None:
        for one in guided:
            one.inner_model = torch.compile(inner_model, backend=backend)
    wrong = []

    def work(one, images):
        for i in range(IMAGES):
            if not same(image(one, i), images[i]):
                wrong.append(i)

    in_threads(*[lambda one=one, images=images: work(one, images) for one, images in zip(guided, expected, strict=True)] * 2)
    assert not wrong, f"{len(wrong)} images are wrong"


@pytest.mark.parametrize("backend", [None, pytest.param("eager", marks=pytest.mark.slow)])
def test_errors_in_one_thread_do_not_disturb_the_others(backend, fresh_dynamo, hectic):
    kind = "SAG in one pass, PAG and SEG"
    guided, expected = wrap(kind), alone(kind)
    if backend is not None:
        guided.inner_model = torch.compile(guided.inner_model, backend=backend)
    image(guided, 0)
    wrong, failures = [], []

    def works():
        for i in range(IMAGES):
            if not same(image(guided, i), expected[i]):
                wrong.append(i)

    def fails():
        for i in range(IMAGES):
            try:
                image(guided, i, unknown_keyword=1)
            except TypeError:
                failures.append(i)
            if not same(image(guided, i), expected[i]):
                wrong.append(i)

    in_threads(works, fails, works, fails)
    assert len(failures) == 2 * IMAGES and not wrong


def test_a_call_while_another_thread_compiles_waits_for_its_turn(fresh_dynamo):
    """PyTorch reports compilation to every thread, including those that run ksag uncompiled."""
    guided = wrap("SAG")
    expected = alone("SAG")[:2]
    compiles, goes_on = threading.Event(), threading.Event()

    def backend(graph, example_inputs):
        compiles.set()
        assert goes_on.wait(60)
        return graph

    guided.inner_model = torch.compile(guided.inner_model, backend=backend)
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
    guided = wrap("SAG")
    inner_model, expected = guided.inner_model, image(guided, 0)
    guided.inner_model = torch.compile(inner_model, backend="eager")
    image(guided, 0)
    raised = KeyboardInterrupt()

    def interrupted():
        with hooked("before its forward", guided.inner_model, raises(raised)):
            assert failing_call(guided, raised)

    in_threads(interrupted)
    images = []
    in_threads(*[lambda: images.append(image(guided, 0))] * 2)
    assert len(images) == 2 and all(same(one, expected) for one in images)


@pytest.mark.parametrize("kind", ["SAG in one pass", "SAG, every 2nd call"])
def test_a_run_is_its_own_threads(kind, hectic):
    """What is kept, and a rule's momentum, of threads that come one after another, and may have an id that was another's."""
    guided = wrap(kind, cfg_rule=cfg.apg(momentum=-0.5))
    first = call(guided, sigma=3.0)
    expected = call(guided, sigma=2.0)
    runs = []

    def run():
        runs.append((call(guided, sigma=3.0), call(guided, sigma=2.0)))

    for _ in range(20):
        in_threads(run)
    assert not same(first, expected)
    assert all(same(begin, first) and same(end, expected) for begin, end in runs)
