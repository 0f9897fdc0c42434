import json
import signal
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.utils.logging import disable_propagation, enable_propagation
from huggingface_hub import ModelCard

from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    Evaluator,
    RCFDPipeline,
    RCFDScheduler,
    SFDDistillationConfig,
    SFDDistillationTrainer,
    load_image_data,
)
from diffusers_rcfd.distillation.terms import spatial_distance
from diffusers_rcfd.distillation.trajectory import Route, teacher_states
from diffusers_rcfd.pipelines.trajectory_sampler import TrajectoryPipeline
from diffusers_rcfd.schedulers.trajectories import euler_step, nearest_indices, one_step_target, rho_nodes, solve
from tests.toys import parameters, tiny_classifier, tiny_teacher


def trainer(folder, teacher=None, classifier=None, lpips=None, **options):
    defaults = {
        "max_train_steps": 4,
        "train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "checkpointing_steps": 1,
    }
    config = SFDDistillationConfig(output_dir=str(folder), **(defaults | options))
    return SFDDistillationTrainer(teacher or tiny_teacher(), classifier, config, lpips)


def batch_of(run, stage, size=4, seed=0, **extra):
    return run.draw(stage, size, torch.Generator().manual_seed(seed)) | extra


def losses(run, stage, batch):
    """The terms at each node, as the loop asks for them, of a student that stays as it is."""
    for pair in run.pairs(stage, batch):
        yield run.compute_loss(stage, pair)


def start_of(run, stage, batch):
    """The state x = z / alpha at the first node."""
    return batch["noise"] / stage.scheduler.alpha[stage.routes[0].student[0]].item()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(1)
    return tiny_classifier().eval()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_optimizer_step_for_each_node_along_the_students_own_trajectory(tmp_path):
    """The loop against the algorithm written out: the weights moved at a node are those of the next."""
    run = trainer(tmp_path / "loop", student_steps=[3], max_train_steps=2, optimizer="sgd", learning_rate=64e-5)
    student = run.train()

    other = trainer(tmp_path / "by-hand", student_steps=[3])
    stage = other.begin()
    scheduler, nodes, model = other.scheduler, other.routes[0].student, stage.model
    assert len(nodes) == 5 and nodes[0] == 1016 and nodes[-1] == 0
    nu = (scheduler.sigma / scheduler.alpha).tolist()
    optimizer = torch.optim.SGD(model.parameters(), 64e-5, momentum=0.9)
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = (64e-5, 64e-6)[step]  # a tenth from half-way
        other.state.step = step
        x = start_of(other, stage, other._draws(stage)[0])
        targets = teacher_states(stage.teacher, other.routes[0], x)
        for i, (k, k_next) in enumerate(pairwise(nodes)):
            s, s_next = nu[k], nu[k_next]
            if i == 0:
                x = x + (s_next - s) * x / (1 + s**2) ** 0.5
                continue
            D = model(scheduler.alpha[k].item() * x, torch.full((4,), k)).sample
            x_next = x + (s_next - s) * (x - D) / s
            loss = (x_next - targets[i]).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = x_next.detach()
    difference = (parameters(student.unet) - parameters(model)).abs().max()
    moved = (parameters(student.unet) - parameters(tiny_teacher().unet)).abs().max()
    assert moved > 1e-4 and difference < 0.01 * moved


def test_student_of_one_teacher_step_starts_without_loss(tmp_path, classifier):
    """K = 1 by Euler without AFS: the target is the student's own step, in every objective."""
    for objective in ("l1", "cfd"):
        run = trainer(tmp_path, None, classifier, student_steps=[3], teacher_steps=1, teacher_solver="euler",
                      analytical_first_step=False, objective=objective)  # fmt: skip
        stage = run.begin()
        for terms in losses(run, stage, batch_of(run, stage)):
            assert abs(terms["l1"].item()) < 1e-3 and abs(terms["loss"].item()) < 1e-3


@pytest.mark.parametrize("solver, order, thresholding", [
    ("heun", 3, True), ("dpm-solver++", 3, True), ("dpm-solver++", 2, True), ("dpm-solver++", 3, False),
])  # fmt: skip
def test_targets_are_every_kth_state_of_the_solver(tmp_path, solver, order, thresholding):
    run = trainer(tmp_path, student_steps=[2], teacher_steps=3, teacher_solver=solver, solver_order=order,
                  dynamic_thresholding=thresholding)  # fmt: skip
    teacher = run.begin().teacher
    with torch.no_grad():
        run.teacher.unet.conv_out.weight.mul_(20)  # beyond 1, where thresholding does something
    route = run.routes[0]
    assert route.teacher[::3] == route.student and len(route.student) == 4
    x = 82 * torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))

    def states(*options):
        nu = run.scheduler.nu[route.teacher].tolist()
        with torch.no_grad():
            return solve(lambda x, i: teacher.at_index(x, route.teacher[i]), x, nu, *options)

    targets = teacher_states(teacher, route, x)
    for target, expected in zip(targets, states(solver, order, thresholding)[3::3], strict=True):
        torch.testing.assert_close(target, expected)
    if (solver, order, thresholding) != ("dpm-solver++", 3, True):
        assert (targets[-1] - states("dpm-solver++", 3, True)[-1]).abs().max() > 0.01


def test_nodes_follow_the_noise_levels_asked_for(tmp_path):
    levels = {"sigma_max": 40.0, "sigma_min": 0.02, "rho": 5.0}
    run, usual = (trainer(tmp_path, student_steps=[2], teacher_steps=3, **own) for own in (levels, {}))
    expected = {steps: nearest_indices(run.scheduler.nu, rho_nodes(4, 40.0, 0.02, 5.0, steps)) for steps in (1, 3)}
    assert run.routes == [Route(expected[1], expected[3], student_analytical_first=True)]
    assert run.routes[0].teacher_evaluations == 9
    assert not set(expected[3]) & {*usual.routes[0].teacher}


def test_student_has_no_dropout(tmp_path):
    model = trainer(tmp_path, tiny_teacher(dropout=0.5)).begin().model
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([900, 30])
    model.train()
    assert torch.equal(model(z, t).sample, model(z, t).sample)


def test_step_counts_with_teacher_steps_of_their_own_learn_one_trajectory(tmp_path):
    options = {"student_steps": [1, 2, 4], "teacher_steps": [8, 4, 2], "analytical_first_step": False}
    routes = trainer(tmp_path, **options).routes
    assert [len(route.student) for route in routes] == [2, 3, 5]
    assert len(routes[0].teacher) == 9 and all(route.teacher == routes[0].teacher for route in routes)


def test_loss_terms_of_the_objectives(tmp_path, classifier):
    def first_terms(**options):
        run = trainer(tmp_path, classifier=classifier, **options)
        stage = run.begin()
        return next(losses(run, stage, batch_of(run, stage)))

    alone = first_terms()
    assert alone["loss"] == alone["l1"] and "feature_kl" not in alone
    cfd = first_terms(objective="cfd")
    assert cfd["loss"] == cfd["feature_kl"] > 0
    torch.testing.assert_close(cfd["l1"], alone["l1"])
    mixed = first_terms(objective="cfd", l1_weight=0.5, cfd_weight=2.0)
    torch.testing.assert_close(mixed["loss"], 2 * cfd["feature_kl"] + 0.5 * alone["l1"])
    mixture = first_terms(terms=["l1=0.5", "feature_kl=2"])
    torch.testing.assert_close(mixture["loss"], mixed["loss"])
    assert first_terms(objective="pd")["image"] > 0
    assert {"entropy", "diversity"} <= first_terms(objective="rcfd").keys()
    spatial = [
        first_terms(objective="cfd", distribution="spatial", spatial_loss=loss)["spatial"] for loss in ("l1", "kl")
    ]
    assert len({cfd["feature_kl"].item(), *(value.item() for value in spatial)}) == 3


def test_closed_form_of_the_pair(tmp_path):
    """cfd compares the student's D with the D* whose Euler step reaches the teacher's state."""
    run = trainer(tmp_path)
    stage = run.begin()
    batch = batch_of(run, stage)
    targets = teacher_states(stage.teacher, run.routes[0], start_of(run, stage, batch))
    pairs = []
    for pair in run.pairs(stage, batch):
        run.compute_loss(stage, pair)
        pairs.append(pair)
    levels = run.scheduler.nu[run.routes[0].student[1:]].tolist()
    for pair, target, (s, s_next) in zip(pairs, targets[1:], pairwise(levels), strict=True):
        x_next = pair.landing(pair.x0)
        distance = (1 - s_next / s) * (pair.x0 - pair.x0_target)
        torch.testing.assert_close(x_next - target, distance, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pair.landing(pair.x0_target), target, rtol=1e-3, atol=1e-4)
        start = (x_next - (1 - s_next / s) * pair.x0) / (s_next / s)
        torch.testing.assert_close(start, pair.step.x, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(euler_step(start, pair.x0_target, s, s_next), target, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one_step_target(start, target, s, s_next), pair.x0_target, rtol=1e-3, atol=1e-3)
    assert [pair.is_last for pair in pairs] == [False, True]


@pytest.mark.parametrize("options", [{}, {"student_steps": [1, 3], "ema_decay": 0.9}])
def test_resume_between_trajectories_is_bit_identical(tmp_path, options):
    trainer(tmp_path / "whole", **options).train()
    run = trainer(tmp_path / "resumed", **options)
    compute_loss = run.compute_loss

    def interrupt(stage, pair):
        if run.state.step == 2 and pair.is_last:
            raise KeyboardInterrupt
        return compute_loss(stage, pair)

    run.compute_loss = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.train()
    trainer(tmp_path / "resumed", resume_from_checkpoint="latest", **options).train()
    for name in ("unet/diffusion_pytorch_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_accumulated_batches_take_turns_at_the_nodes(tmp_path):
    """Two batches of two are one of four: the same noise, and one optimizer step for both at each node."""
    options = {"max_train_steps": 2, "optimizer": "sgd", "learning_rate": 64e-5}
    whole = trainer(tmp_path / "whole", **options).train()
    parts = trainer(tmp_path / "parts", train_batch_size=2, gradient_accumulation_steps=2, **options).train()
    difference = (parameters(whole.unet) - parameters(parts.unet)).abs().max()
    moved = (parameters(whole.unet) - parameters(tiny_teacher().unet)).abs().max()
    assert moved > 1e-4 and difference < 0.01 * moved


def test_sfd_v_starts_as_the_teacher_and_learns_its_step_counts(tmp_path):
    run = trainer(tmp_path / "start", student_steps=[1, 2, 3])
    stage = run.begin()
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([900, 30])
    for row in range(3):
        out = stage.model(z, t, torch.full((2,), row)).sample
        torch.testing.assert_close(out, run.teacher.unet(z, t).sample)
    assert {int(batch_of(run, stage, seed=seed)["route"][0]) for seed in range(20)} == {0, 1, 2}

    pipe = trainer(tmp_path / "run", student_steps=[1, 2, 3], max_train_steps=8).train()
    assert len(set(pipe.unet.class_embedding.weight.sum(1).tolist())) == 3  # zero no more, and each its own
    loaded = RCFDPipeline.from_pretrained(tmp_path / "run")
    for model in (pipe, loaded):
        model.set_progress_bar_config(disable=True)
        assert model.num_classes is None
    calls = []
    loaded.unet.register_forward_pre_hook(lambda module, args: calls.append(int(args[2][0])))
    for N in (1, 2, 3):
        calls.clear()
        images = loaded(2, N, latents=z, output_type="pt").images
        assert calls == [N - 1] * N
        torch.testing.assert_close(images, pipe(2, N, latents=z, output_type="pt").images)
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be one of \[1, 2, 3\].* got 4"):
        loaded(num_inference_steps=4)


@pytest.mark.parametrize("data_std", [1.0, 0.5])
def test_sampling_follows_the_trajectory_of_training(tmp_path, data_std):
    teacher = RCFDPipeline(tiny_teacher().unet, RCFDScheduler(data_std=data_std))
    run = trainer(tmp_path, teacher, analytical_first_step=True)
    stage = run.begin()
    batch = batch_of(run, stage)
    with torch.no_grad():
        states = [pair.landing(pair.x0) for pair in run.pairs(stage, batch)]
    pipe = RCFDPipeline(stage.model, run.scheduler)
    pipe.set_progress_bar_config(disable=True)
    expected = (data_std * run.scheduler.alpha[0].item() * states[-1] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe(4, latents=batch["noise"], output_type="pt").images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("data_std, solver", [(1.0, "dpm-solver++"), (0.5, "dpm-solver++"), (1.0, "heun")])
def test_teacher_sampler_ends_where_the_targets_do(tmp_path, data_std, solver):
    teacher, calls = RCFDPipeline(tiny_teacher().unet, RCFDScheduler(data_std=data_std)), []
    run = trainer(tmp_path, teacher, student_steps=[1, 2], teacher_steps=[4, 3], teacher_solver=solver)
    assert list(run.teacher_samplers) == ([16, 18] if solver == "heun" else [8, 9])
    teacher.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    z = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    for route, (evaluations, sampler) in zip(run.routes, run.teacher_samplers.items(), strict=True):
        x = z / run.scheduler.alpha[route.student[0]].item()
        last = teacher_states(run.begin().teacher, route, x)[-1]
        expected = (data_std * run.scheduler.alpha[route.student[-1]].item() * last / 2 + 0.5).clamp(0, 1)
        calls.clear()
        sampler.set_progress_bar_config(disable=True)
        images = sampler(4, latents=z, output_type="pt").images
        assert len(calls) == evaluations and 0.1 < expected.std() < 0.9
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`num_inference_steps` must be 12, the evaluations of its nodes, got 2"):
        trainer(tmp_path, teacher).teacher_samplers[12](4, num_inference_steps=2)


@pytest.mark.parametrize("nodes", [[], [5], [3, 7], [2000, 3], [5, 5, 0], [5, -1]])
def test_trajectory_of_no_falling_indices(nodes):
    with pytest.raises(ValueError, match=r"`nodes` must be two or more falling indices in 0..1024, got \["):
        TrajectoryPipeline(tiny_teacher().unet, RCFDScheduler(), nodes)


def test_class_conditional_teacher(tmp_path):
    teacher = tiny_teacher(num_class_embeds=3)
    run = trainer(tmp_path / "start", teacher, student_steps=[1, 2])
    stage = run.begin()
    assert stage.model.config.num_class_embeds == 6
    assert batch_of(run, stage, 64)["labels"].unique().tolist() == [0, 1, 2]
    z, t = torch.randn(3, 1, 8, 8), torch.tensor([900, 30, 5])
    expected = teacher.unet(z, t, torch.arange(3)).sample
    torch.testing.assert_close(stage.model(z, t, torch.arange(3) + 3).sample, expected)
    torch.testing.assert_close(stage.student(2).predict(z, t, torch.arange(3)), expected)
    pipe = trainer(tmp_path / "run", teacher, student_steps=[1, 2], max_train_steps=1).train()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_classes == 3 and pipe(2, class_labels=[0, 2], output_type="pt").images.shape == (2, 1, 8, 8)


def test_second_stage(tmp_path, classifier):
    """Teacher and start are the 5-evaluation student; its nodes hold those of the single evaluation."""
    for counts in ([5], [2, 5]):
        teacher = trainer(tmp_path / f"first{counts}", student_steps=counts, max_train_steps=1).train()
        if len(counts) > 1:
            torch.nn.init.normal_(teacher.unet.class_embedding.weight)
        run = trainer(tmp_path, teacher, classifier, student_steps=[1], perceptual_weight=0.5)
        stage, route = run.begin(), run.routes[0]
        batch = batch_of(run, stage)
        z, t = batch["noise"], torch.full((4,), 700)
        row = None if len(counts) == 1 else torch.ones(4, dtype=torch.int64)  # that of 5 evaluations
        torch.testing.assert_close(stage.model(z, t).sample, teacher.unet(z, t, row).sample, rtol=0, atol=1e-5)
        assert route.teacher[::3] == route.student and len(route.teacher) == 7
        assert list(run.teacher_samplers) == [5]
        assert stage.model.config.num_class_embeds is None  # one step count needs no table
        teacher.set_progress_bar_config(disable=True)
        last = teacher_states(stage.teacher, route, start_of(run, stage, batch))[-1]
        images = teacher(4, 5, latents=z, output_type="pt").images
        torch.testing.assert_close((run.scheduler.alpha[0].item() * last / 2 + 0.5).clamp(0, 1), images,
                                   rtol=0, atol=1e-4)  # fmt: skip
        (pair,) = run.pairs(stage, batch)
        terms = run.compute_loss(stage, pair)
        x_next = pair.landing(pair.x0)
        torch.testing.assert_close(terms["perceptual"], spatial_distance(classifier, x_next, last, stage.objective))
        assert terms["perceptual"] > 0.01
        torch.testing.assert_close(terms["loss"], terms["l1"] + 0.5 * terms["perceptual"])

    seen = []

    def lpips(a, b):
        seen.append((a.shape, b.shape))
        return (a - b).square().mean((1, 2, 3), keepdim=True)

    run = trainer(tmp_path, teacher, None, lpips, student_steps=[1])
    stage = run.begin()
    (terms,) = losses(run, stage, batch_of(run, stage))
    assert seen == [((4, 3, 8, 8),) * 2] and terms["lpips"] > 0
    with pytest.raises(ValueError, match="`classifier` must be given for the term 'perceptual'"):
        trainer(tmp_path, teacher, student_steps=[1])
    with pytest.raises(ValueError, match="`student_steps` must be such that its nodes .* are among"):
        trainer(tmp_path, teacher, classifier, student_steps=[3])


def test_metrics_of_a_term_of_the_last_node_alone(tmp_path, classifier):
    """Means over all nodes, so that they add up as the loss does."""
    teacher = trainer(tmp_path / "first", student_steps=[5], max_train_steps=1).train()
    trainer(tmp_path / "second", teacher, classifier, student_steps=[2], logging_steps=2).train()
    for line in metrics(tmp_path / "second"):
        assert line["perceptual"] > 0
        assert line["loss"] == pytest.approx(line["l1"] + line["perceptual"], rel=1e-5)


def test_lpips_that_does_not_fit_or_is_not_used(tmp_path, caplog):
    teacher = trainer(tmp_path / "first", student_steps=[5], max_train_steps=1).train()
    lpips = SimpleNamespace(min_size=16)
    allowed = r"`lpips` must be for images of 1 or 3 channels and 16 pixels a side or more, got \(1, 8, 8\)"
    with pytest.raises(ValueError, match=allowed):
        trainer(tmp_path, teacher, None, lpips, student_steps=[1])
    enable_propagation()
    try:
        trainer(tmp_path, None, None, lambda a, b: 0)
    finally:
        disable_propagation()
    assert "`lpips` is not used" in caplog.text


def test_classifier_that_is_not_used(tmp_path, classifier, caplog):
    """By no loss, so neither does the card name it."""
    enable_propagation()
    try:
        run = trainer(tmp_path / "run", None, classifier, max_train_steps=1)
    finally:
        disable_propagation()
    assert "`classifier` is not used: the loss compares images" in caplog.text
    run.train()
    run.create_model_card(tmp_path / "run")
    assert "- classifier: none" in (tmp_path / "run/README.md").read_text()


def test_card_tells_the_objective_and_every_step_count(tmp_path, classifier):
    options = {"student_steps": [1, 3], "max_train_steps": 1, "num_sample_images": 4}
    for objective, teacher in (("l1", tiny_teacher()), ("rcfd", tiny_teacher(num_class_embeds=3))):
        folder = tmp_path / objective
        run = trainer(folder, teacher, classifier, objective=objective, **options)
        run.train()
        run.create_model_card(folder)
        card = ModelCard.load(folder / "README.md")
        assert "arxiv:2409.19681" in card.data.tags and "zhou2024simple" in card.text
        for words in ("- teacher: a local model", "num_inference_steps=3", "# or 1"):
            assert words in card.text, words
        guided = objective == "rcfd"
        assert guided == ("compared by RCFD" in card.text) == ("arxiv:2211.12039" in card.data.tags)
        assert guided == ("sun2023accelerating" in card.text) == ("class_labels=[3 + label] * 16" in card.text)
        assert guided == ("class_labels=[0 + label] * 16" in card.text)
        assert guided != ("class_labels=[1] * 16" in card.text)
        for N in (1, 3):
            assert str(RCFDPipeline.from_pretrained(folder).stock_call(N)["timesteps"]) in card.text


def test_teacher_in_half_precision_is_refused_before_the_folder_is_used(tmp_path, classifier):
    teacher = tiny_teacher().to(torch.bfloat16)
    for kind, config in ((SFDDistillationTrainer, SFDDistillationConfig(str(tmp_path / "run"))),
                         (CFDDistillationTrainer, CFDDistillationConfig(str(tmp_path / "run")))):  # fmt: skip
        with pytest.raises(ValueError, match="`teacher` must be in float32, .*, got torch.bfloat16"):
            kind(teacher, classifier, config)
    assert not (tmp_path / "run").exists()


def test_evaluation_without_an_evaluator(tmp_path):
    run = trainer(tmp_path, max_train_steps=1)
    run.train()
    with pytest.raises(ValueError, match="`evaluator` must be given, here or to the trainer"):
        run.evaluate()


def test_trajectory_is_not_saved_nor_that_of_a_student(tmp_path):
    run = trainer(tmp_path / "run")
    (sampler,) = run.teacher_samplers.values()
    with pytest.raises(ValueError, match="`save_directory` must be unset: save `RCFDPipeline"):
        sampler.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="`scheduler` must be of a base model, without `nodes`"):
        TrajectoryPipeline(tiny_teacher().unet, run.scheduler, [5, 0])


def test_single_step_is_taken_at_the_whole_learning_rate(tmp_path):
    one, constant = (trainer(tmp_path / name, max_train_steps=1, lr_scheduler=name).train()
                     for name in ("piecewise_constant", "constant"))  # fmt: skip
    assert torch.equal(parameters(one.unet), parameters(constant.unet))


def test_stages_that_the_classifier_lacks(tmp_path, classifier):
    options = {"distribution": "spatial", "feature_stages": [9]}
    message = r"`feature_stages` must suit the classifier, got \[9\]: .* must be in -"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, None, classifier, objective="cfd", **options)
    ladder = CFDDistillationConfig(str(tmp_path), student_steps=[1], objective="cfd", **options)
    with pytest.raises(ValueError, match=message):
        CFDDistillationTrainer(tiny_teacher(), classifier, ladder, load_image_data())


def test_teacher_of_diffusers_keeps_its_name_and_leaves_no_folder_in_the_student(tmp_path):
    DDIMPipeline(tiny_teacher().unet, DDIMScheduler()).save_pretrained(tmp_path / "teacher")
    teacher = DDIMPipeline.from_pretrained(tmp_path / "teacher")
    run = trainer(tmp_path / "run", teacher, max_train_steps=1)
    assert str(run.teacher_name) == str(tmp_path / "teacher")
    run.train()
    run.create_model_card(tmp_path / "run")  # of a teacher from a `Path`
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "run/unet").glob("*.json"))
    for kind in (SFDDistillationTrainer, CFDDistillationTrainer):
        with pytest.raises(TypeError, match="`teacher` must be a pipeline with a unet and a scheduler, got str"):
            kind("a/name")


def test_schedule_that_does_not_reach_the_nodes_or_cannot_be_inverted(tmp_path, caplog):
    """Stable Diffusion's ends at 14.6: the nodes are the nearest there are, and it is said."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    enable_propagation()
    try:
        run = trainer(tmp_path, RCFDPipeline(tiny_teacher().unet, scheduler))
    finally:
        disable_propagation()
    assert "does not reach the nodes 80, 10.9, 0.67, 0.006: they are 14.6, 10.9, 0.67, 0.0292" in caplog.text
    assert list(run.teacher_samplers) == [len(run.routes[0].teacher) - 1]
    flat = RCFDScheduler(trained_betas=[0.9] * 1025)
    with pytest.raises(ValueError, match="The schedule must be invertible"):
        trainer(tmp_path, RCFDPipeline(tiny_teacher().unet, flat))


def test_student_of_sfd_is_no_teacher_of_a_ladder(tmp_path):
    run = trainer(tmp_path)
    student = RCFDPipeline(tiny_teacher().unet, run.scheduler)
    with pytest.raises(ValueError, match="`teacher` must be on the uniform grid, without `nodes`"):
        CFDDistillationTrainer(student, tiny_classifier(), None, load_image_data())


def test_node_that_is_not_finite_is_skipped_alone(tmp_path):
    """The weights stay at the poisoned node, and the other nodes of its trajectory are learnt and logged."""
    run = trainer(tmp_path / "run", student_steps=[3], max_train_steps=2, ema_decay=0.5)
    compute_loss, weights, nodes, seen = run.compute_loss, [], [], []

    def poison(stage, pair):
        weights.append(parameters(stage.model).clone())
        nodes.append(pair.step.s)
        poisoned = run.state.step == 1 and pair.step.s == nodes[1]
        terms = compute_loss(stage, pair)
        seen.append(terms["loss"].item())
        return terms | {"loss": terms["loss"] * (torch.nan if poisoned else 1)}

    run.compute_loss = poison
    student = run.train()
    assert [not torch.equal(*pair) for pair in pairwise(weights)] == [True, True, True, True, False]
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 1]
    assert [line["loss"] for line in lines] == pytest.approx([sum(seen[:3]) / 3, (seen[3] + seen[5]) / 2])
    assert parameters(student.unet).isfinite().all()

    run = trainer(tmp_path / "nothing", max_train_steps=9, max_skipped_steps=3)
    all_terms = run.compute_loss
    run.compute_loss = lambda *args: {name: term * torch.nan for name, term in all_terms(*args).items()}
    with pytest.raises(FloatingPointError, match="4 steps in a row .* up to step 2 of student"):
        run.train()


@pytest.mark.parametrize("parts", [2, 4])
def test_rcfd_of_accumulated_batches_is_that_of_the_whole(tmp_path, classifier, parts):
    """Diversity is no mean over batches: it is taken over all of them, at every node of their walks."""

    def gradients(accumulated):
        run = trainer(tmp_path, None, classifier, student_steps=[2], objective="rcfd",
                      regularization_weight=1.0, entropy_ratio=0.0, cfd_weight=0.1)  # fmt: skip
        stage = run.begin()
        draws = {name: value.chunk(accumulated) for name, value in batch_of(run, stage, 8).items()}
        batches = [{name: value[i] for name, value in draws.items()} for i in range(accumulated)]
        found = []
        for functions in run.optimizer_steps(stage, batches):
            stage.model.zero_grad()
            for function in functions:
                (function()["loss"] / accumulated).backward()
            found.append(torch.cat([weight.grad.flatten() for weight in stage.model.parameters()]))
        return found

    for whole, accumulated in zip(gradients(1), gradients(parts), strict=True):
        assert (whole - accumulated).abs().max() < 1e-4 * whole.abs().max()


def test_checkpoint_of_other_nodes_or_another_teacher_is_refused(tmp_path):
    trainer(tmp_path, max_train_steps=2).train()
    again = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    for name, other in (("nodes", {"student_steps": [4]}), ("teacher_nodes", {"teacher_steps": 3}),
                        ("student_steps", {"student_steps": [3], "analytical_first_step": False}),
                        ("solver", {"teacher_solver": "heun"}), ("solver", {"dynamic_thresholding": False}),
                        ("network.num_class_embeds", {"teacher": tiny_teacher(num_class_embeds=3)})):  # fmt: skip
        with pytest.raises(ValueError, match=f"is of another run: its {name} is"):
            trainer(tmp_path, **again | other).train()


def test_signal_between_trajectories_saves_and_resumes(tmp_path):
    """Data-free training passes the same place between two steps as any other."""
    options = {"checkpointing_steps": 0, "student_steps": [1, 2]}
    trainer(tmp_path / "whole", **options).train()
    run = trainer(tmp_path / "stopped", **options)
    compute_loss = run.compute_loss

    def stop(stage, pair):
        if run.state.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return compute_loss(stage, pair)

    run.compute_loss = stop
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == 128 + signal.SIGTERM and (tmp_path / "stopped/checkpoint-2").is_dir()
    trainer(tmp_path / "stopped", resume_from_checkpoint="latest", **options).train()
    for name in ("unet/diffusion_pytorch_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_evaluation_while_training_keeps_the_best_student(tmp_path, classifier):
    evaluator = Evaluator(classifier, load_image_data(max_images=32), name="tiny", cache_dir=False)
    config = SFDDistillationConfig(output_dir=str(tmp_path), max_train_steps=3, train_batch_size=4, eval_steps=1,
                                   student_steps=[1, 2], learning_rate=1e-2, logging_steps=3, eval_num_images=16,
                                   load_best_model_at_end=True)  # fmt: skip
    student = SFDDistillationTrainer(tiny_teacher(), config=config, evaluator=evaluator).train()
    values = [line["FD(tiny)"] for line in metrics(tmp_path) if "FD(tiny)" in line]
    best = RCFDPipeline.from_pretrained(tmp_path / "best/student")
    assert len(values) == 3 and best.scheduler.trained_steps == [1, 2]
    assert torch.equal(parameters(student.unet), parameters(best.unet))
    recorded = json.loads((tmp_path / "evaluation.json").read_text())
    assert recorded["2"]["metrics"]["fd"]["value"] == min(values)


def test_stock_pipeline_as_teacher_and_the_records_of_a_run(tmp_path):
    ours = tiny_teacher()
    stock = DDIMPipeline(ours.unet, ours.scheduler.to_ddim())
    trainer(tmp_path / "run", stock, max_train_steps=2, sample_steps=2, num_sample_images=4).train()
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and {"loss", "l1"} <= lines[0].keys()
    assert (tmp_path / "run/samples/student-0000002.png").is_file()
    run = trainer(tmp_path / "run", stock, resume_from_checkpoint="latest")
    evaluator = Evaluator(tiny_classifier().eval(), load_image_data(max_images=32), name="tiny", cache_dir=False)
    results = run.evaluate(evaluator, num_images=16)
    assert list(results) == [2] and metrics(tmp_path / "run")[-1]["num_inference_steps"] == 2
    run.create_model_card(tmp_path / "run")
    card = (tmp_path / "run/README.md").read_text()
    assert "**2 network evaluations** by SFD" in card and "timesteps=[964, 379]" in card
    assert f"2 steps: FD(tiny) {results[2]['metrics']['fd']['value']:.3f}" in card


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student_steps": [0]}, r"`student_steps` must be positive integers, one or more, all different, got \[0\]"),
        ({"student_steps": [2, 2]}, "`student_steps` must be positive integers, one or more, all different"),
        ({"student_steps": []}, "`student_steps` must be positive integers, one or more"),
        (
            {"teacher_steps": 0},
            r"`teacher_steps` must be one positive integer, or one for each of the 1 step counts, got \[0",
        ),
        ({"student_steps": [1, 2, 4], "teacher_steps": [8, 4]}, "or one for each of the 3 step counts"),
        ({"sigma_min": 80.0}, "`sigma_min` must be below sigma_max=80.0, got 80.0"),
        ({"sigma_max": 0.001}, "`sigma_min` must be below sigma_max=0.001, got 0.006"),
        ({"sigma_min": 0.0}, "`sigma_min` must be a number above 0"),
        ({"rho": -1.0}, "`rho` must be a number above 0"),
        ({"nodes": [80.0, 0.1, 1.0, 0.006]}, r"`nodes` must be 3 or more falling levels above 0, got \[80.0, 0.1"),
        ({"nodes": [80.0, 0.006]}, "`nodes` must be 3 or more falling levels"),
        ({"teacher_solver": "rk4"}, "`teacher_solver` must be one of"),
        ({"random_flip": True}, "`random_flip` must be False: SFD takes no images, got True"),
        ({"dataloader_num_workers": 2}, "`dataloader_num_workers` must be 0: SFD takes no images, got 2"),
        ({"lr_warmup_steps": 5}, "`lr_warmup_steps` must be 0 with lr_scheduler 'piecewise_constant', got 5"),
        ({"solver_order": 4}, "`solver_order` must be 1, 2 or 3, got 4"),
        ({"objective": "sfd"}, r"`objective` must be one of \('pd', 'l1', 'cfd', 'rcfd'\), got 'sfd'"),
        ({"terms": ["toy=1"]}, r"`terms` must be of \('image', .*got 'toy'"),
        ({"temperature": 1.5}, r"`temperature` must be in \(0, 1\], got 1.5"),
        ({"l1_weight": 1.0}, "`l1_weight` must be 0 for objective 'l1'"),
        ({"objective": "cfd", "cfd_weight": 0.0}, "`cfd_weight` must be above 0 where no other loss is left"),
        ({"objective": "cfd"}, "`classifier` must be given for the term 'feature_kl'"),
        ({"nodes": [80.0, 0.0061, 0.006]}, "`teacher` must be of a schedule that tells the nodes"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)
