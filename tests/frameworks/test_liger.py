"""Our losses against Liger's own chunked ones, plain PyTorch, over the options that both have.

Liger computes log-probabilities and losses in float32 whatever it is given, and so do the tests.
Tolerances: `CLOSE`, relative for a loss and for the norm of a gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmloss_ext import linear_cross_entropy, linear_distillation_loss, linear_log_probs, losses

pytest.importorskip("liger_kernel")

from liger_kernel import chunked_loss as liger

CLOSE = 1e-5

B, S, D, V = 3, 6, 8, 13
LENGTHS = [3, 6, 1, 5, 2, 4]


class Problem:
    """Hidden states (2 B, S, D) of a policy and a reference, two projections, and labels."""

    def __init__(self, bias=True):
        torch.manual_seed(0)
        self.hidden, self.other = torch.randn(2, 2 * B, S, D)
        self.weight, self.other_weight = torch.randn(2, V, D) * 0.5
        self.bias, self.other_bias = torch.randn(2, V) if bias else (None, None)
        self.labels = torch.randint(0, V, (2 * B, S))
        for row, length in enumerate(LENGTHS):
            self.labels[row, length:] = -100
        self.valid = self.labels != -100

    def leaves(self):
        tensors = (self.hidden, self.weight, self.bias)
        return [None if t is None else t.clone().requires_grad_() for t in tensors]

    def reference(self, used):
        """As Liger's modules take it, and as ours do."""
        if not used:
            return (), {}
        names = ("reference_input", "reference_weight", "reference_bias")
        tensors = (self.other, self.other_weight, self.other_bias)
        return tensors, dict(zip(names, tensors, strict=True))

    def scores(self, hidden, weight, bias, *, average):
        """The log-probability of each sequence."""
        tokens = linear_log_probs(hidden, weight, self.labels, linear_bias=bias)
        return losses.sequence_log_probs(tokens, self.valid, average=average)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def problem(request):
    return Problem(request.param)


def close(ours, theirs, tolerance=CLOSE):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert (ours - theirs).norm() <= tolerance * theirs.norm().clamp_min(1e-3)


def same(problem, ours, theirs):
    """Both return a loss and what they report; the losses and their gradients are the same."""
    found = []
    for loss in (ours, theirs):
        leaves = problem.leaves()
        value, reported = loss(*leaves)
        leaves = [leaf for leaf in leaves if leaf is not None]
        # Twice the loss: a gradient that comes from above is multiplied in.
        found.append((value, torch.autograd.grad(2 * value, leaves), reported))
    (value, grads, reported), (their_value, their_grads, their_reported) = found
    close(value, their_value)
    for grad, want in zip(grads, their_grads, strict=True):
        assert want.norm() > 1e-3
        close(grad, want)
    assert reported.keys() == their_reported.keys()
    for name, want in their_reported.items():
        close(reported[name], want)


def of_pairs(module, reference=(), **how):
    """What Liger's module of pairs reports: averages are over the pairs, as ours are."""
    names = ("chosen", "rejected", "chosen_logits", "rejected_logits", "nll", "chosen_rewards",
             "rejected_rewards", "log_odds_ratio", "log_odds_chosen")  # fmt: skip

    def loss(problem):
        def call(hidden, weight, bias):
            value, found = module(weight, hidden, problem.labels, bias, *reference, **how)
            reported = dict(zip(names, found, strict=False))
            # The mean logit also counts padding: nothing that a trainer wants.
            del reported["chosen_logits"], reported["rejected_logits"]
            if not module.compute_nll_loss:
                del reported["nll"]
            return value, reported

        return call

    return loss


def said_of(found):
    """The same, as we report it."""
    named = {
        "chosen": found.chosen_log_probs,
        "rejected": found.rejected_log_probs,
        "nll": found.nll_loss,
        "chosen_rewards": found.chosen_rewards,
        "rejected_rewards": found.rejected_rewards,
        "log_odds_ratio": None if found.log_odds_ratio is None else found.log_odds_ratio.mean(),
        "log_odds_chosen": None if found.log_odds_chosen is None else found.log_odds_chosen.mean(),
    }
    return found.loss, {name: value for name, value in named.items() if value is not None}


def pairs(problem, loss, **options):
    def call(hidden, weight, bias):
        return said_of(
            losses.linear_preference_loss(
                hidden, weight, problem.labels, loss=loss, linear_bias=bias, **options
            )
        )

    return call


# ------------------------------------------------------------------------------------ preferences

KINDS = {
    "sigmoid": {}, "hinge": {}, "nca_pair": {}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {},
    "apo_down": {}, "exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.2},
    "discopop": {"discopop_tau": 0.3},
}  # fmt: skip


def test_liger_has_no_other_kind_of_dpo():
    assert KINDS.keys() == liger.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_dpo(problem, kind, beta):
    tensors, reference = problem.reference(True)
    theirs = liger.LigerFusedLinearDPOLoss(loss_type=kind, beta=beta, compiled=False, **KINDS[kind])
    ours = pairs(problem, "dpo", kind=kind, beta=beta, **reference, **KINDS[kind])
    same(problem, ours, of_pairs(theirs, tensors)(problem))


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_dpo_with_a_cross_entropy(problem, alpha):
    """Of the chosen sequences; here a second kind, ``"sft"``, with its weight, as in TRL."""
    tensors, reference = problem.reference(True)
    theirs = liger.LigerFusedLinearDPOLoss(alpha=alpha, compute_nll_loss=True, compiled=False)
    ours = pairs(problem, "dpo", kind=("sigmoid", "sft"), loss_weights=(1.0, alpha), **reference)
    same(problem, ours, of_pairs(theirs, tensors)(problem))


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_dpo_of_averages_and_without_a_reference(problem, average, with_reference):
    """TRL has neither: averages are ours to take (`sequence_log_probs`), a reference may be 0."""
    theirs = liger.LigerFusedLinearDPOLoss(
        average_log_prob=average, use_ref_model=with_reference, compiled=False
    )
    tensors, _ = problem.reference(with_reference)

    def ours(hidden, weight, bias):
        policy = problem.scores(hidden, weight, bias, average=average)
        reference = torch.zeros(2 * B)
        if with_reference:
            reference = problem.scores(*tensors, average=average)
        return said_of(losses.dpo_loss(*policy.chunk(2), *reference.chunk(2)))

    same(problem, ours, of_pairs(theirs, tensors)(problem))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_cpo(problem, eps, alpha):
    how = {"beta": 0.2, "label_smoothing": eps}
    theirs = liger.LigerFusedLinearCPOLoss(alpha=alpha, compiled=False, **how)

    def ours(hidden, weight, bias):
        chosen, labels = hidden[:B], problem.labels[:B]
        nll = linear_cross_entropy(chosen, weight, labels, linear_bias=bias)
        loss = pairs(problem, "cpo", cpo_alpha=alpha, nll_loss=nll, **how)
        return loss(hidden, weight, bias)

    same(problem, ours, of_pairs(theirs)(problem))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize(("gamma", "eps"), [(0.5, 0.0), (1.4, 0.1), (0.0, 0.0)])
def test_simpo(problem, gamma, eps, alpha):
    """The paper's gamma, and no gamma / beta as its authors' trainer has it; TRL has the paper's.

    Liger's class adds a cross entropy unless told otherwise, which the paper has not: with it this
    is CPO-SimPO.
    """
    how = {"beta": 2.0, "label_smoothing": eps}
    theirs = liger.LigerFusedLinearSimPOLoss(
        gamma=gamma, alpha=alpha, compute_nll_loss=alpha != 0, compiled=False, **how
    )
    ours = pairs(problem, "simpo", gamma=gamma, **how)
    if alpha:
        how |= {"kind": "simpo", "simpo_gamma": gamma, "cpo_alpha": alpha}
        ours = pairs(problem, "cpo", **how)
    same(problem, ours, of_pairs(theirs)(problem))


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("with_prompt", [False, True])
def test_orpo(problem, beta, with_prompt):
    """The cross entropy may be of other labels, such as TRL's, which has the prompts too."""
    theirs = liger.LigerFusedLinearORPOLoss(beta=beta, compiled=False)
    how = {}
    if with_prompt:
        how["nll_target"] = torch.randint(0, V, (2 * B, S))
        how["nll_target"][:, -1] = -100

    def ours(hidden, weight, bias):
        options = {"beta": beta}
        if with_prompt:
            labels = how["nll_target"][:B]
            options["nll_loss"] = linear_cross_entropy(hidden[:B], weight, labels, linear_bias=bias)
        return pairs(problem, "orpo", **options)(hidden, weight, bias)

    same(problem, ours, of_pairs(theirs, **how)(problem))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("kl", [None, 0.3])
def test_kto(problem, kl, with_reference, average):
    """Rewards are sums over the chosen and the others there, means here, as in TRL's metrics."""
    good = torch.tensor([True, False, False, True, True, False])
    tensors, _ = problem.reference(with_reference)
    module = liger.LigerFusedLinearKTOLoss(
        beta=0.2, use_ref_model=with_reference, average_log_prob=average, compiled=False
    )
    divergence = None if kl is None else torch.tensor(kl)
    names = ("ref_input", "ref_weight", "ref_bias")

    def theirs(hidden, weight, bias):
        value, found = module(
            hidden, weight, problem.labels, bias, good,
            **dict(zip(names, tensors, strict=False)), kl=divergence,
        )  # fmt: skip
        chosen, rejected, _, _, chosen_rewards, rejected_rewards = found
        return value, {
            "chosen": chosen / good.sum(), "rejected": rejected / (~good).sum(),
            "chosen_rewards": chosen_rewards / good.sum(),
            "rejected_rewards": rejected_rewards / (~good).sum(),
        }  # fmt: skip

    def ours(hidden, weight, bias):
        policy = problem.scores(hidden, weight, bias, average=average)
        reference = torch.zeros(2 * B)
        if with_reference:
            reference = problem.scores(*tensors, average=average)
        found = losses.kto_loss(policy, reference, good, kl=torch.tensor(kl or 0.0), beta=0.2)
        return found.loss, {
            "chosen": found.chosen_log_probs, "rejected": found.rejected_log_probs,
            "chosen_rewards": found.chosen_rewards, "rejected_rewards": found.rejected_rewards,
        }  # fmt: skip

    same(problem, ours, theirs)


# --------------------------------------------------------------------------------------- policies

POLICIES = {
    "grpo": {}, "bnpo": {}, "dapo": {}, "dr_grpo": {"max_completion_length": 9},
    "cispo": {"epsilon_high": 1.3}, "sapo": {"sapo_temperature_neg": 1.4},
    "vespo": {"vespo_k_neg": 2.5},
}  # fmt: skip
HOW = {
    "plain": {},
    "two clips": {"epsilon_high": 0.1},
    "two-sided": {"delta": 1.3},
    "temperature": {"temperature": 0.7},
    "no KL": {"beta": 0.0},
    "corrected KL": {"use_bias_correction_kl": True},
    "rollout": {"rollout": True},
    "num_items": {"num_items": 31},
    "reference of hidden states": {"hidden_reference": True},
    "no old policy": {"old": False},
}


def same_policy(problem, loss_type, mask, level="token", **changes):
    """Liger's module and ours, with an old policy and a reference unless ``changes`` say no."""
    how = {"beta": 0.3, "use_bias_correction_kl": False, "temperature": 1.0, **changes}
    is_hidden, with_old = how.pop("hidden_reference", False), how.pop("old", True)
    with_ratio, items = how.pop("rollout", False), how.pop("num_items", None)
    # Ours refuse an option that their loss does not have.
    clips = {} if loss_type in ("sapo", "vespo") else {"epsilon_high": how.pop("epsilon_high", 0.2)}
    labels = problem.labels.clamp_min(0)
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.9, -0.2])
    temperature = how["temperature"]
    with torch.no_grad():
        now = linear_log_probs(
            problem.hidden, problem.weight, labels, linear_bias=problem.bias,
            temperature=temperature,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    old, reference = (now + 0.3 * torch.randn(now.shape, generator=generator) for _ in range(2))
    # 1 at padding: Liger's VESPO multiplies in what stands there.
    ratio = torch.where(mask, 0.5 + torch.rand(now.shape, generator=generator), 1.0)
    has_kl = how["beta"] != 0
    module = liger.LigerFusedLinearGRPOLoss(
        loss_type=loss_type, importance_sampling_level=level, epsilon_low=0.2,
        use_ref_model=has_kl, compiled=False, **clips, **how,
    )  # fmt: skip
    given = {"ref_per_token_logps": reference} if has_kl else {}
    known = {"reference_log_probs": reference} if has_kl else {}
    if is_hidden:
        tensors, known = problem.reference(True)
        given = dict(zip(("ref_input", "ref_weight", "ref_bias"), tensors, strict=True))
    if with_old:
        given["old_per_token_logps"] = known["old_log_probs"] = old
    if with_ratio:
        given["vllm_is_ratio"] = known["importance_sampling_ratio"] = ratio

    def theirs(hidden, weight, bias):
        value, found = module(
            hidden, weight, labels, mask.float(), advantages, bias, num_items_in_batch=items,
            **given,
        )  # fmt: skip
        *kl, clipped = found
        reported = {"clipped": clipped} if level == "token" else {}
        return value, reported | ({"kl": kl[0]} if kl else {})

    def ours(hidden, weight, bias):
        found = losses.linear_policy_loss(
            hidden, weight, labels, advantages=advantages, mask=mask, linear_bias=bias,
            loss_type=loss_type, importance_sampling_level=level, epsilon=0.2,
            num_items=items, **known, **clips, **how,
        )  # fmt: skip
        metrics = found.metrics
        # A clipped ratio of a sequence is counted once here, for each of its tokens there.
        reported = {"clipped": metrics.clip_low + metrics.clip_high} if level == "token" else {}
        return found.loss, reported | ({"kl": metrics.kl} if has_kl else {})

    same(problem, ours, theirs)


def belongs(loss_type, name):
    """Whether the loss has the option, in both."""
    is_clipped = loss_type in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")
    return {
        "two clips": is_clipped,
        "two-sided": is_clipped,
        "num_items": loss_type in ("dapo", "cispo", "vespo"),
        "corrected KL": loss_type != "vespo",
    }.get(name, True)


@pytest.mark.parametrize(
    ("loss_type", "name"),
    [(kind, name) for kind in POLICIES for name in HOW if belongs(kind, name)],
)
def test_policies(loss_type, name):
    problem = Problem()
    same_policy(problem, loss_type, problem.valid, **POLICIES[loss_type] | HOW[name])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("name", ["plain", "two-sided", "corrected KL", "no KL"])
def test_ratios_of_sequences(loss_type, name):
    problem = Problem()
    how = POLICIES[loss_type] | HOW[name]
    same_policy(problem, loss_type, problem.valid, "sequence", **how)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_without_padding(level):
    """Liger's, and TRL's, also adds what masked positions hold: the paper's sum has none of them.

    So the two agree where there is no padding.
    """
    problem = Problem()
    everything = torch.ones_like(problem.valid)
    same_policy(problem, "luspo", everything, level)


# ----------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("hard", "soft"), [(0.5, 0.5), (0.0, 1.0)])
def test_jsd(problem, beta, temperature, hard, soft):
    """Liger leaves out the T^2 by which Hinton et al. multiply the soft loss; TRL does, too.

    A teacher of more classes is another matter: Liger gives the student logits of 0 there, we leave
    them out.
    """
    module = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=soft, beta=beta, temperature=temperature,
        compiled=False, return_soft_hard_loss=True, chunk_size=5,
    )  # fmt: skip
    labels = problem.labels.flatten()

    def theirs(hidden, weight, bias):
        value, of_teacher, of_labels = module(
            hidden.flatten(0, 1), weight, problem.other.flatten(0, 1), problem.other_weight, labels,
            bias, problem.other_bias,
        )  # fmt: skip
        return value, {"soft": of_teacher, **({"hard": of_labels} if hard else {})}

    def ours(hidden, weight, bias):
        square = temperature**2
        found = linear_distillation_loss(
            hidden, weight, problem.other, problem.other_weight, problem.labels, student_bias=bias,
            teacher_bias=problem.other_bias, weight_hard_loss=hard, weight_soft_loss=soft / square,
            direction="jsd", beta=beta, temperature=temperature,
        )  # fmt: skip
        named = {"soft": found.soft_loss / square, **({"hard": found.hard_loss} if hard else {})}
        return found.loss, named

    same(problem, ours, theirs)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_cosine(problem, beta):
    """Of logits, there; ours is of any vectors, DistilBERT's of hidden states."""
    module = liger.LigerFusedLinearCosineSimilarityLoss(
        weight_hard_loss=0.4, weight_soft_loss=0.6, beta=beta, compiled=False, chunk_size=5
    )
    labels = problem.labels.flatten()

    def theirs(hidden, weight, bias):
        teacher = (problem.other.flatten(0, 1), problem.other_weight)
        value = module(hidden.flatten(0, 1), weight, *teacher, labels, bias, problem.other_bias)
        return value, {}

    def ours(hidden, weight, bias):
        hard = linear_cross_entropy(hidden, weight, problem.labels, linear_bias=bias)
        student = F.linear(hidden, weight, bias)
        teacher = F.linear(problem.other, problem.other_weight, problem.other_bias)
        soft = losses.cosine_distillation_loss(student, teacher, target=problem.labels)
        return 0.4 * hard + 0.6 * beta * soft, {}

    same(problem, ours, theirs)
