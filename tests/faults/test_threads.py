"""One UNet for several threads or loops: each image is the one made alone, or a clear error comes before it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from conftest import image, make_pipeline, make_unet, unet_inputs
from situations import KEEPING, MAIN, REUSING, SETTINGS, inputs_of, is_one_of, pair, scheduler, sibling, sweep

import agentsd

STEPS = 5


class Meeting:
    """A place where threads wait for each other, as long as they all can: a lock around calls may keep one out."""

    def __init__(self, threads: int) -> None:
        self._barrier = threading.Barrier(threads)

    def wait(self, *_) -> None:
        with suppress(threading.BrokenBarrierError):
            self._barrier.wait(timeout=1)

    def callback(self, pipe, step, timestep, tensors):
        self.wait()
        return tensors

    def leave(self) -> None:
        self._barrier.abort()


def together(jobs: list, meeting: Meeting) -> list:
    """The result of each job in a thread of its own, or its error."""

    def run(job):
        try:
            return job()
        except Exception as error:
            meeting.leave()
            return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def is_clear(error) -> bool:
    """It is ours, and names the cause."""
    return isinstance(error, RuntimeError) and "agentsd" in str(error) and "thread" in str(error)


def pipelines(count: int, kind: str):
    first = make_pipeline(scheduler=scheduler(kind))
    return [first, *(sibling(first, scheduler(kind)) for _ in range(count - 1))]


def in_a_thread(job):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(job).result()


def images_of(pipes, arguments: list[dict], where: str):
    """All at once; ``where`` says at what points of an image the threads wait for each other."""
    meeting = Meeting(len(pipes))
    extra, handle = {}, None
    if where == "between steps":
        extra = {"callback_on_step_end": meeting.callback}
    if where == "inside of calls":
        handle = pipes[0].unet.conv_in.register_forward_pre_hook(meeting.wait)
    jobs = [lambda p=p, a=a: image(p, steps=STEPS, **a, **extra) for p, a in zip(pipes, arguments, strict=True)]
    try:
        return together(jobs, meeting)
    finally:
        if handle is not None:
            handle.remove()


WHERE = ["between steps", "inside of calls", "nowhere"]


def check(kind, settings, arguments, where, through="pipeline"):
    alone = []
    for index, its in enumerate(arguments):
        pipes = pipelines(len(arguments), kind)
        alone.append([])
        for handle in (pipes[0], pipes[index], pipes[0].unet):
            if settings is not None:
                agentsd.apply_patch(handle, **settings)
            alone[-1].append(in_a_thread(lambda p=pipes[index], its=its: image(p, steps=STEPS, **its)))
    pipes = pipelines(len(arguments), kind)
    if settings is not None:
        agentsd.apply_patch(pipes[0] if through == "pipeline" else pipes[0].unet, **settings)
    found = images_of(pipes, arguments, where)
    for image_or_error, expected in zip(found, alone, strict=True):
        assert is_clear(image_or_error) or is_one_of(image_or_error, expected), image_or_error


@pytest.mark.parametrize("where", WHERE)
def test_threads_on_an_unpatched_unet(where):
    """What holds without a patch, or the other tests here would prove nothing."""
    check("DDIM", None, [{"seed": seed} for seed in range(2)], where)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", sweep(SETTINGS))
@pytest.mark.parametrize("kind", sweep(["DDIM", "Euler", "Heun"], ["DDIM"]))
def test_two_threads_with_a_pipeline_each(kind, name, where):
    """Bit for bit what each thread gives alone, wherever one overtakes the other."""
    check(kind, SETTINGS[name], [{"seed": seed} for seed in range(2)], where)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", sweep(MAIN, ["balanced"]))
def test_four_threads_on_a_unet_that_was_patched_alone(name, where):
    """Patched through the UNet, no thread's scheduler is known beforehand."""
    check("DDIM", SETTINGS[name], [{"seed": seed} for seed in range(4)], where, through="UNet")


@pytest.mark.parametrize("where", sweep(WHERE, ["inside of calls"]))
@pytest.mark.parametrize("name", sweep(SETTINGS))
def test_two_threads_of_different_sizes(name, where):
    """A plan for one size never meets the tokens of another."""
    check("DDIM", SETTINGS[name], [{"height": size, "width": size} for size in (16, 24)], where)


@pytest.mark.parametrize("name", sweep(SETTINGS))
def test_threads_leave_a_unet_that_can_be_unpatched(name):
    """After concurrent images the next one is right, and removal gives the unpatched image back."""
    pipe, other = pair()
    plain = image(pipe, steps=STEPS)
    agentsd.apply_patch(pipe, **SETTINGS[name])
    expected = image(pipe, steps=STEPS)
    images_of([pipe, other], [{"seed": 1}, {"seed": 2}], "inside of calls")
    assert torch.equal(image(pipe, steps=STEPS), expected)
    agentsd.remove_patch(pipe)
    assert torch.equal(image(pipe, steps=STEPS), plain)


# One thread, and loops that take turns


def user_loop(unet, user: int, steps: int = 6, kind: str = "DDIM", given=lambda t: t, **others):
    """One UNet call of an image, with a scheduler of its own, for each `next`. ``given`` is what it makes of t."""
    own = scheduler(kind)
    own.set_timesteps(steps)
    inputs = inputs_of(user, batch=1) | others
    for t in own.timesteps:
        x = own.scale_model_input(inputs["sample"], t)
        noise = unet(**{**inputs, "sample": x, "timestep": given(t)}).sample
        inputs["sample"] = own.step(noise, t, inputs["sample"])[0]
        yield inputs["sample"]


ORDERS = {
    "in step": [0, 1] * 6,
    "in changing order": [0, 1, 1, 0] * 3,
    "one starts later": [0, 0, 0] + [0, 1] * 3 + [1] * 3,
    "one inside the other": [0] + [1] * 6 + [0] * 5,
}


def in_turns(unet, order, users, kinds=("DDIM", "DDIM"), **others):
    loops = [user_loop(unet, user, kind=kind, **others) for user, kind in zip(users, kinds, strict=True)]
    found = [None, None]
    for which in order:
        found[which] = next(loops[which])
    return found


@pytest.mark.parametrize("through", ["pipeline", "UNet"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", sweep(KEEPING, ["reuse"]))
def test_nothing_of_one_loop_shows_in_the_other(name, order, through):
    """Two images whose calls come in turns: another second image leaves the first as it was."""
    found = []
    for second in (1, 2):
        pipe = make_pipeline()
        agentsd.apply_patch(pipe if through == "pipeline" else pipe.unet, **SETTINGS[name])
        found.append(in_turns(pipe.unet, order, (0, second))[0])
    assert torch.equal(*found)


GIVEN = {"an element": lambda t: t, "repeated": lambda t: t.repeat(1), "a number": int}


@pytest.mark.parametrize("through", ["pipeline", "UNet"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", sweep(KEEPING, ["reuse"]))
def test_nothing_of_a_loop_shows_in_another_of_the_same_prompt(name, given, order, through):
    """Their latents alone tell them apart, where timesteps do not say whose schedule they are of."""
    found = []
    text = inputs_of(0, batch=1)["encoder_hidden_states"]
    for second in (1, 2):
        pipe = make_pipeline()
        pipe.scheduler.set_timesteps(6)
        agentsd.apply_patch(pipe if through == "pipeline" else pipe.unet, **SETTINGS[name])
        shared = {"given": GIVEN[given], "encoder_hidden_states": text}
        found.append(in_turns(pipe.unet, order, (0, second), **shared)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("kinds", [("DDIM", "DDIM"), ("DDIM", "Euler"), ("Heun", "DDIM")], ids=str)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", sweep(["agents", "sampling"]))
def test_without_reuse_loops_in_turns_are_each_alone(name, order, kinds):
    """Phase and draw follow each loop's own timesteps."""
    alone = [[*user_loop(agentsd.apply_patch(make_pipeline(), **SETTINGS[name]).unet, user, kind=kind)][5]
             for user, kind in enumerate(kinds)]  # fmt: skip
    pipe = agentsd.apply_patch(make_pipeline(), **SETTINGS[name])
    found = in_turns(pipe.unet, order, (0, 1), kinds)
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("name", KEEPING)
def test_an_image_made_in_the_callback_of_another(name):
    """A preview by a second pipeline on the same UNet, inside of an image of the first: both are those made alone."""
    alone = []
    for index in range(2):
        pipes = pair()
        agentsd.apply_patch(pipes[0], **SETTINGS[name])
        first = image(pipes[index], steps=STEPS)
        agentsd.apply_patch(pipes[index], **SETTINGS[name])
        alone.append([first, image(pipes[index], steps=STEPS)])
    pipe, other = pair()
    agentsd.apply_patch(pipe, **SETTINGS[name])
    previews = []

    def preview(pipe, step, timestep, tensors):
        if step == 1:
            previews.append(image(other, steps=STEPS))
        return tensors

    assert torch.equal(image(pipe, steps=STEPS, callback_on_step_end=preview), alone[0][0])
    assert is_one_of(previews[0], alone[1])


@pytest.mark.parametrize("settings", ["agents", "sampling"])
def test_a_layer_that_another_thread_has_taken_over_does_what_was_planned(settings):
    """A thread that finds agent attention in a layer's place has agents, or samples keys, all the same."""
    pipe = make_pipeline()
    agentsd.apply_patch(pipe, **{**SETTINGS[settings], "min_tokens": 0})
    alone = image(pipe, steps=2)
    attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    other = pipe.unet._agentsd_patch.blocks[0]._processors["attn1"]
    other.take_over(attn, None)  # by a call that never comes
    together = image(pipe, steps=2)
    other.give_back(attn)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", REUSING)
def test_replicas_reuse_no_features(name):
    """`torch.nn.DataParallel` copies what a module has, so that a replica's middle would be the original's."""
    replica = agentsd.apply_patch(make_unet(), **SETTINGS[name])._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel"):
        replica(**unet_inputs())
