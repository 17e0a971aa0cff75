"""Models share nothing: trained in turns, each goes as it would alone."""

from torch import nn

from torchloco import LocoProp


def test_interleaved_as_alone(mlp, batches, train, values, same):
    settings = [
        ((6, 5, 4, 3), nn.Tanh, {"lr": 1e-3, "loss": "matching", "output": "sigmoid"}),
        ((6, 7, 3), nn.ReLU, {"lr": 1e-2, "loss": "squared", "local_steps": 3, "activation_lr": 1.0}),
    ]
    data = batches(4)

    def make():
        models = [mlp(*sizes, activation=activation) for sizes, activation, _ in settings]
        return [(m, LocoProp(m, **options)) for m, (_, _, options) in zip(models, settings, strict=True)]

    alone = make()
    expected = [train(model, optimizer, data) for model, optimizer in alone]
    together = make()
    losses = [[], []]
    for batch in data:
        for k, (model, optimizer) in enumerate(together):
            losses[k] += train(model, optimizer, [batch])
    assert losses == expected
    for (a, _), (b, _) in zip(alone, together, strict=True):
        assert same(values(a), values(b))


def test_one_pass_within_the_other(mlp, batches, values, same):
    """Forward and backward of two models overlap."""
    data = batches(3)

    def loop(models, optimizers):
        for x, y in data:
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses = [nn.functional.mse_loss(model(x), y) for model in models]
            for loss in reversed(losses):
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()

    together = [mlp(seed=0), mlp(seed=1)]
    loop(together, [LocoProp(m, lr=1e-3) for m in together])
    for seed in (0, 1):
        alone = mlp(seed=seed)
        loop([alone], [LocoProp(alone, lr=1e-3)])
        assert same(values(alone), values(together[seed]))
