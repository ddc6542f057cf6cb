"""Do passes that start from kept states give what passes through all layers give, and is only the top trained?"""

from dataclasses import replace

import pytest
import torch
from test_classifier import CONFIG, C, make_jobs, make_model

from minipeft.engine import Engine, label_scores
from minipeft.errors import InputError
from minipeft.labels import Classes
from minipeft.methods.bottleneck import Houlsby
from minipeft.methods.head import Head
from minipeft.methods.stack import Stack
from minipeft.models import trunk
from minipeft.models.classifier import POOLINGS
from minipeft.models.trunk import Trunk, keep_top
from minipeft.peftu.features import features

METHODS = {"lora": CONFIG.method, "houlsby": Stack((Houlsby(reduction=3), Head())), "head": Head()}


def made(jobs, pooling="mean"):
    whole = make_model(pooling)
    keep_top(whole, 1)
    return whole, Trunk(whole, (q.prompt for job in jobs for q in (*job.train, *job.val)))


def test_the_top_layers_are_what_is_left():
    model = make_model()
    before = list(model.sites)
    keep_top(model, 1)
    assert list(model.sites) == [site for site in before if site.startswith("layers.1.")]
    assert set(model.blocks) == {"layers.1.attn", "layers.1.mlp"} and set(model.attentions) == {"layers.1.attn"}
    assert set(model.norms) == {"layers.1.attn_norm", "layers.1.mlp_norm"} and not model.embeddings
    keep_top(model, 1)  # a base that several tasks share
    assert list(model.sites) == [site for site in before if site.startswith("layers.1.")]
    with pytest.raises(InputError, match="has 2 layers"):
        keep_top(make_model(), 3)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_kept_states_train_and_answer_as_all_layers_do(method, pooling, monkeypatch):
    monkeypatch.setattr(trunk, "TOKEN_BUDGET", 64)  # several passes
    jobs = [replace(job, config=replace(job.config, method=method)) for job in make_jobs(3)]
    whole, top = made(jobs, pooling)
    assert top.first == 1 and len(top.starts) == len({q.prompt for job in jobs for q in (*job.train, *job.val)})
    slow, quick = (Engine(model, Classes(C)).train(jobs) for model in (whole, top))
    for user in slow:
        assert (slow[user].row - quick[user].row).norm() <= 1e-5 * slow[user].row.norm()
    asked = {job.user: job.val for job in jobs}
    texts = [job.val[0].prompt for job in jobs]
    feature = features(whole, texts)
    for text, again in features(top, texts).items():
        torch.testing.assert_close(torch.from_numpy(again), torch.from_numpy(feature[text]))
    for user, scores in label_scores(top, Classes(C), quick, asked).items():
        torch.testing.assert_close(torch.from_numpy(scores),
                                   torch.from_numpy(label_scores(whole, Classes(C), slow, asked)[user]))


def test_the_lower_layers_do_not_run(monkeypatch):
    jobs = make_jobs(2)
    _, top = made(jobs)
    monkeypatch.setattr(top.encoder.layers[0], "forward", lambda *args: pytest.fail("a frozen layer ran"))
    Engine(top, Classes(C)).train(jobs)


def test_an_unknown_text_is_an_error():
    jobs = make_jobs(1)
    _, top = made(jobs)
    asked = {jobs[0].user: [replace(jobs[0].val[0], prompt=(1, 2, 3))]}
    adapters = Engine(top, Classes(C)).train(jobs)
    with pytest.raises(ValueError, match="has no kept states"):
        label_scores(top, Classes(C), adapters, asked)
