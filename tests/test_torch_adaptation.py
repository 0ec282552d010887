"""Adaptation at test time: what is mixed, what is remembered, and that nothing of a model changes."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

import fastbn.torch  # noqa: E402

nn = torch.nn
adapt = fastbn.torch.adapt


def layer(kind: Any = nn.BatchNorm2d, dtype: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    bn = kind(3, dtype=dtype)
    with torch.no_grad():
        for t, low, high in ((bn.weight, 0.5, 2), (bn.bias, -1, 1), (bn.running_mean, -1, 1), (bn.running_var, 0.5, 2)):
            t.uniform_(low, high)
    return nn.Sequential(bn).eval()


def drawn(n: int = 5, seed: int = 1, dtype: Any = torch.float64) -> Any:
    return torch.randn(n, 3, 4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).add(3).to(dtype)


def mixed(parts: list[tuple[float, Any, Any]]) -> tuple[Any, Any]:
    """Mean and variance of populations together: each a weight, a mean, a variance."""
    total = sum(w for w, *_ in parts)
    mean = sum(w * m for w, m, _ in parts) / total
    return mean, sum(w * (v + (m - mean) ** 2) for w, m, v in parts) / total


def of(x: Any) -> tuple[Any, Any]:
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=False)


def normalized(bn: Any, x: Any, mean: Any, var: Any) -> Any:
    def shaped(v: Any) -> Any:
        return v.detach().double().reshape(1, 3, *[1] * (x.dim() - 2))

    return (x.double() - shaped(mean)) / (shaped(var) + bn.eps).sqrt() * shaped(bn.weight) + shaped(bn.bias)


@pytest.mark.parametrize("prior", [0, 1, 8, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_running_statistics_count_as_those_of_so_many_samples(prior: int, dtype: Any) -> None:
    model, x = layer(dtype=torch.float64 if dtype == torch.float64 else torch.float32), drawn(dtype=dtype)
    bn, state = model[0], copy.deepcopy(model.state_dict())
    want = normalized(bn, x, *mixed([(prior, bn.running_mean.double(), bn.running_var.double()), (5, *of(x))]))
    adapt(model, prior=prior)
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for _ in range(2):  # no call knows of another
        y = model(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert isinstance(bn, nn.BatchNorm2d)


@pytest.mark.parametrize("memory", [1, 12, math.inf])
def test_a_stream_is_remembered_and_fades(memory: float) -> None:
    model = layer()
    bn, known = model[0], (3.0, model[0].running_mean, model[0].running_var)
    adaptation = adapt(model, prior=3, memory=memory)
    streams = []
    for _ in range(2):
        known = (3.0, bn.running_mean, bn.running_var)
        for i, n in enumerate((5, 1, 7, 2)):
            x = drawn(n, i)
            weight = known[0] if i == 0 else min(known[0], memory)
            mean, var = mixed([(weight, *known[1:]), (n, *of(x))])
            known = (weight + n, mean, var)
            torch.testing.assert_close(model(x), normalized(bn, x, mean, var), rtol=1e-12, atol=1e-12)
        streams.append(model(drawn()))
        adaptation.reset()
    assert torch.equal(*streams)


def test_it_is_reversible_and_training_is_as_ever() -> None:
    model, plain, x = layer(dtype=torch.float32), layer(dtype=torch.float32), drawn(dtype=torch.float32)
    with adapt(model, prior=0) as adaptation:
        assert list(adaptation.layers) == ["0"]
        assert not torch.equal(model(x), plain(x))
        model.train(), plain.train()
        assert torch.equal(model(x), plain(x))
        model.eval(), plain.eval()
    assert type(model[0]) is nn.BatchNorm2d
    assert model[0].__dict__.keys() == plain[0].__dict__.keys()
    assert torch.equal(model(x), plain(x))
    adaptation.revert()
    with pytest.raises(ZeroDivisionError), adapt(model):
        raise ZeroDivisionError
    assert type(model[0]) is nn.BatchNorm2d


def test_what_was_reverted_by_another_is_left_alone() -> None:
    model = layer()
    first = adapt(model)
    fastbn.torch.Adaptation(model).revert()
    second = adapt(model, prior=0)
    first.revert()  # which is of layers that adapt anew since
    assert first.skipped == 0
    assert list(second.layers) == ["0"]
    assert type(model[0]) is not nn.BatchNorm2d
    second.revert()
    assert type(model[0]) is nn.BatchNorm2d


def test_a_class_that_was_derived_since_stays_and_no_longer_adapts() -> None:
    """As those of torch.nn.utils.parametrize; without it the layer is of the class that it had before."""
    model, x = layer(), drawn()
    plain = model(x)
    adaptation = adapt(model, prior=0)
    adapted = model(x)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", torch.nn.Identity())
    torch.testing.assert_close(model(x), adapted)
    torch.testing.assert_close(copy.deepcopy(model)(x), adapted)
    adaptation.revert()
    torch.testing.assert_close(model(x), plain)
    assert fastbn.torch.Adaptation(model).skipped == 0
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    fastbn.torch.Adaptation(model).revert()
    assert type(model[0]) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), plain)


def test_of_wrong_inputs_torch_says_what_is_wrong() -> None:
    plain, model = layer(), layer()
    adapt(model, memory=9)
    for x in (
        torch.ones(2, 3), torch.ones(2, 4, 3, 3), torch.ones(2, 3, 3, 3, dtype=torch.int32), torch.ones(2, 3, 3, 3, device="meta")
    ):  # fmt: skip
        errors = []
        for m in (plain, model):
            with pytest.raises((ValueError, RuntimeError)) as error:
                m(x)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]
    assert model.to("meta")(torch.ones(2, 3, 3, 3, device="meta")).is_meta


def test_copies_and_pickles_adapt_too() -> None:
    model, x = layer(), drawn()
    adapt(model, prior=2, memory=20)
    model(x)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301  our own
    want = model(drawn(seed=2))
    for other in others:
        assert torch.equal(other(drawn(seed=2)), want)
        assert type(other[0]) is type(model[0])
        fastbn.torch.Adaptation(other).revert()
        assert type(other[0]) is nn.BatchNorm2d
    assert list(fastbn.torch.Adaptation(model).layers) == ["0"]


def test_data_that_are_not_finite_are_not_remembered() -> None:
    model, x = layer(), drawn()
    adaptation = adapt(model, memory=50)
    bad = drawn()
    bad[1, 1, 0, 0] = math.nan
    first = model(x)
    y = model(bad)
    assert torch.isfinite(y[0]).all()
    assert adaptation.skipped == 1
    adaptation.reset()
    assert torch.equal(model(x), first)
    assert adaptation.skipped == 0
    again = adapt(plain := layer(), prior=0)
    assert torch.isfinite(plain(bad)[0]).all()
    assert again.skipped == 1
    assert plain(bad[:0]).shape == (0, 3, 4, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor")
def test_where_values_cannot_be_read_it_says_so() -> None:
    model, x = layer(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    adapt(model)
    for why, call in (
        ("inside of torch.func's transforms", lambda: torch.func.vmap(model)(x[None])),
        ("inside of torch.func's transforms", lambda: torch.func.grad(lambda x: model(x).sum())(x)),
        ("while torch.jit traces", lambda: torch.jit.trace(model, x)),
        ("while torch.jit traces or torch.export exports|where torch records", lambda: torch.export.export(model, (x,))),
    ):
        with pytest.raises(TypeError, match=f"a layer that adapts reads the values of its input, and not .*({why})"):
            call()
    fastbn.torch.Adaptation(model).revert()
    torch.func.vmap(model)(x[None])


def test_one_sample_of_one_value() -> None:
    model = layer(nn.BatchNorm1d)
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    bn = model[0]
    want = normalized(bn, x, *mixed([(8, bn.running_mean, bn.running_var), (1, x[0], torch.zeros(3, dtype=torch.float64))]))
    adapt(model)
    torch.testing.assert_close(model(x), want)


def test_threads_share_a_model() -> None:
    model, x = layer(), [drawn(n, n) for n in range(1, 5)]
    adapt(model, prior=2)
    want, wrong = [model(v) for v in x], []

    def run(i: int) -> None:
        wrong.extend(i for _ in range(50) if not torch.equal(model(x[i]), want[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_compiled_model_adapts() -> None:
    model, x = layer(), drawn()
    adapt(model, prior=2, memory=9)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(x), twin(x))


def test_gradients_go_through_statistics_that_are_constants() -> None:
    model, x = layer(), drawn().requires_grad_()
    adapt(model)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0, 0], (y[1] - y[0])[:, 0, 0].detach() / (x[1] - x[0])[:, 0, 0].detach())


class Active(nn.BatchNorm2d):
    def forward(self, input: Any) -> Any:  # noqa: A002  torch's name
        return super().forward(input).relu()


def adapted() -> Any:
    model = layer()
    adapt(model)
    return model


@pytest.mark.parametrize(
    ("error", "message", "model", "options"),
    [
        (TypeError, r"model must be a torch\.nn\.Module", lambda: 3, {}),
        (ValueError, "no batch norm with running statistics", lambda: nn.BatchNorm1d(3, track_running_stats=False), {}),
        (ValueError, "prior must be at least 0, got -1", layer, {"prior": -1}),
        (TypeError, "prior must be an int, got 0.5", layer, {"prior": 0.5}),
        (ValueError, "memory must be at least 1, got 0", layer, {"memory": 0}),
        (TypeError, "memory must be an int", layer, {"memory": "all"}),
        (ValueError, "0 adapts already", adapted, {}),
        (ValueError, "1 cannot adapt: Active has a forward of its own", lambda: nn.Sequential(nn.BatchNorm2d(3), Active(3)), {}),
        (ValueError, "never called", nn.LazyBatchNorm1d, {}),
    ],
)
def test_errors_change_nothing(error: Any, message: str, model: Any, options: dict[str, Any]) -> None:
    made = model()
    kinds = [type(m) for m in made.modules()] if isinstance(made, nn.Module) else []
    with pytest.raises(error, match=message):
        adapt(made, **options)
    assert kinds == ([type(m) for m in made.modules()] if kinds else [])


def test_a_layer_that_adapts_or_does_more_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    adapt(model)
    more = nn.Sequential(nn.Conv2d(3, 3, 1), Active(3)).eval()
    assert fastbn.torch.fold(model).left == {"1": "AdaptedBatchNorm2d has a forward of its own"}
    assert fastbn.torch.fold(more).left == {"1": "Active has a forward of its own"}
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(fastbn.torch.fold(more).model(x), more(x))


def test_a_model_of_another_domain_gets_better() -> None:
    """Digits in other light: what `docs/statistics.md` reports, smaller."""
    datasets = pytest.importorskip("sklearn.datasets")
    torch.manual_seed(0)
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(4):
        for cut in torch.randperm(1200).split(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[cut]), y[cut]).backward()
            optimizer.step()
    model.eval()

    def accuracy() -> float:
        with torch.no_grad():
            found = [model(batch).argmax(1) for batch in (0.5 * x[1200:] + 0.5).split(50)]
        return float((torch.cat(found) == y[1200:]).double().mean())

    before = accuracy()
    with adapt(model, prior=4):
        during = accuracy()
    assert accuracy() == before
    assert during > before + 0.2


def test_an_adaptation_says_which_layers_adapt() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)).eval()
    adaptation = adapt(model)
    assert repr(adaptation) == "Adaptation(layers=['0', '2'], skipped=0)"
    adaptation.revert()
    assert repr(adaptation) == "Adaptation(layers=[], skipped=0)"


def test_a_class_that_lets_no_other_be_derived_leaves_the_model_as_it_was() -> None:
    class Final(type):
        def __new__(cls, name: str, bases: Any, *rest: Any) -> Any:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("this class is final")
            return super().__new__(cls, name, bases, *rest)

    class Sealed(nn.BatchNorm2d, metaclass=Final):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Sealed(3)).eval()
    before = [(type(m), set(vars(m))) for m in model.modules()]
    with pytest.raises(TypeError, match="this class is final"):
        fastbn.torch.adapt(model)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
