"""How good are the features: linear probes and nearest neighbours on frozen ones, or fine-tuning on a few labels.

Everything is fitted on the training set alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslkern
from ssltrain.data import Images
from ssltrain.methods.cpc import frame_count
from ssltrain.speech import Clips, Speech, log_mel_statistics


@dataclass
class Evaluation:
    """Accuracies by key, prefix of a row + name of a column, and what a picture of the features needs.

    An accuracy is NaN where there are fewer than two labels to tell apart.
    """

    accuracies: dict[str, float]
    rows: dict[str, str]  # prefix of the key: what was given to the classifiers
    columns: dict[str, str]  # the rest of the key: what they had to tell
    features: Tensor
    labels: Tensor
    classes: list[str]
    part: str = "test"  # of which these are; "training" where there is no test set


def of_images(encoder: nn.Module, untrained: nn.Module, images: Images, device: torch.device) -> Evaluation:
    """Linear probe and nearest neighbours for the encoder, beside raw pixels and the untrained encoder."""
    rows = {"": "trained", "raw_": "raw pixels", "untrained_": "untrained encoder"}
    columns = {"linear": "linear probe", "knn": "20-NN"}
    if not images.classes:
        shown = images.test if len(images.test) else images.train[:: -(-len(images.train) // 1000)]
        found = features(encoder, shown, device)
        nothing = {row + column: math.nan for row in rows for column in columns}
        none = torch.zeros(len(shown), dtype=torch.long)
        return Evaluation(nothing, rows, columns, found, none, [], "test" if len(images.test) else "training")
    labels = images.train_labels.to(device), images.test_labels.to(device)
    accuracies, seen = {}, {}
    for prefix, network in zip(rows, (encoder, nn.Flatten(), untrained.to(device)), strict=True):
        train, test = (features(network, part, device) for part in (images.train, images.test))
        accuracies[f"{prefix}linear"] = linear_probe(train, labels[0], test, labels[1])
        accuracies[f"{prefix}knn"] = knn(train, labels[0], test, labels[1])
        seen[prefix] = test
    return Evaluation(accuracies, rows, columns, seen[""], images.test_labels, images.classes)


def of_speech(encoder: nn.Module, untrained: nn.Module, speech: Speech, device: torch.device) -> Evaluation:
    """Linear probes for word and speaker on the last context of a clip, beside log-mel statistics of all of it.

    The third figure is the word said by a speaker whom the probe has not heard, the mean over all speakers in turn.
    """
    rows = {"": "trained", "untrained_": "untrained encoder", "log_mel_": "log-mel statistics"}
    columns = {"word": "word", "speaker": "speaker", "word_new_speaker": "word, new speaker"}
    networks: tuple[Callable[[Clips], Tensor], ...] = (
        lambda clips: contexts(encoder, clips, device),
        lambda clips: contexts(untrained.to(device), clips, device),
        lambda clips: log_mel_statistics(clips, speech.rate).to(device),
    )
    words = speech.train_words.to(device), speech.test_words.to(device)
    speakers = speech.train_speakers.to(device), speech.test_speakers.to(device)
    accuracies, seen = {}, {}
    for prefix, network in zip(rows, networks, strict=True):
        train, test = network(speech.train), network(speech.test)
        accuracies[f"{prefix}word"] = linear_probe(train, words[0], test, words[1])
        accuracies[f"{prefix}speaker"] = linear_probe(train, speakers[0], test, speakers[1])
        known = []
        for speaker in range(len(speech.speakers)):
            heard, new = speakers[0] != speaker, speakers[1] == speaker
            if heard.any() and new.any():
                known.append(linear_probe(train[heard], words[0][heard], test[new], words[1][new]))
        known = [accuracy for accuracy in known if not math.isnan(accuracy)]
        accuracies[f"{prefix}word_new_speaker"] = sum(known) / len(known) if known else math.nan
        seen[prefix] = test
    return Evaluation(accuracies, rows, columns, seen[""], speech.test_words, speech.words)


@torch.no_grad()
def contexts(encoder: nn.Module, clips: Clips, device: torch.device, batch: int = 256) -> Tensor:
    """The context of the last frame of each clip: float32 [N, F] on `device`; of a clip too short for one, 0."""
    training = encoder.training
    encoder.eval()
    out = []
    for rows in torch.arange(len(clips)).split(batch):
        part = clips[rows]
        last = torch.tensor([frame_count(n) for n in part.length.tolist()], device=device) - 1
        sound = F.pad(part.padded(), (0, 400)).to(device)  # at least a frame
        found = encoder(sound)[torch.arange(len(part), device=device), last.clamp_min(0)].float()
        out.append(found * (last >= 0).unsqueeze(1))
    encoder.train(training)
    return torch.cat(out)


def fine_tune(
    encoder: nn.Module,
    images: Images,
    share: float,
    augment: Callable[[Tensor], Tensor],
    device: torch.device,
    seed: int = 0,
    steps: int = 400,
    batch: int = 64,
    lr: float = 1e-3,
) -> tuple[float, int]:
    """Test accuracy after training a copy of the encoder and a linear layer on a `share` of the labels, and how many.

    The labelled images are drawn class by class, at least one of each. AdamW with a cosine schedule, every layer at
    the same rate.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in range(len(images.classes)):
        members = (images.train_labels == c).nonzero().flatten()
        count = max(1, round(share * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    rows = torch.cat(chosen)
    pixels, labels = images.train[rows].to(device), images.train_labels[rows].to(device)
    torch.manual_seed(seed)
    encoder = copy.deepcopy(encoder).to(device).train()
    head = nn.Linear(encoder.features, len(images.classes)).to(device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    draws = torch.randint(len(rows), (steps, min(batch, len(rows))), generator=generator).to(device)
    for step, picked in enumerate(draws):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            x = augment(pixels[picked].float() / 255)
        loss = F.cross_entropy(head(encoder(x)), labels[picked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    scores = head(features(encoder, images.test, device))
    return (scores.argmax(1) == images.test_labels.to(device)).float().mean().item(), len(rows)


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, device: torch.device, batch: int = 512) -> Tensor:
    """Features of uint8 images [N, C, H, W] under an encoder in evaluation mode: float32 [N, F] on `device`."""
    training = encoder.training
    encoder.eval()
    out = torch.cat([encoder(part.to(device).float() / 255).float() for part in images.split(batch)])
    encoder.train(training)
    return out


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, iterations: int = 200
) -> float:
    """Test accuracy in [0, 1] of multinomial logistic regression on standardised features, float [N, F] and [M, F].

    The L2 penalty is that of scikit-learn's default (C = 1: half the squared weights over N); nothing is tuned. The
    problem is convex and solved by full-batch L-BFGS from zero, so the result does not depend on a seed. NaN where the
    training labels are all the same: there is nothing to tell.
    """
    if (train_labels == train_labels[:1]).all():
        return math.nan
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a feature that never moves says nothing
    train, test = (train - mean).div_(std), (test - mean).div_(std)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = train.new_zeros(classes, train.shape[1], requires_grad=True)
    bias = train.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), train_labels)
        loss = loss + weight.square().sum() / (2 * len(train))
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        return (F.linear(test, weight, bias).argmax(1) == test_labels).float().mean().item()


@torch.no_grad()
def knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, neighbours: int = 20) -> float:
    """Test accuracy in [0, 1] of the plain majority among the `neighbours` training features nearest by cosine.

    NaN where the training labels are all the same.
    """
    if (train_labels == train_labels[:1]).all():
        return math.nan
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    scores, nearest = sslkern.ops.similarity_topk(test, train, min(neighbours, len(train)))
    votes = scores.new_zeros(len(test), classes).scatter_add_(1, train_labels[nearest], torch.ones_like(scores))
    return int((votes.argmax(1) == test_labels).sum()) / len(test)
