"""What tests of the bases share: hooks from a function of linear sites."""

from minipeft.models.hooks import Hooks


def hooks_of(linear) -> Hooks:
    """linear(sites, x, weights, biases) -> y of each site, as hooks."""

    class OwnLinear(Hooks):
        def linear(self, sites, x, weights, biases):
            return linear(sites, x, weights, biases)

    return OwnLinear()


def site_by_site(linear) -> Hooks:
    """linear(site, x, weight, bias) -> y, as hooks that call it for each site in turn."""
    return hooks_of(lambda sites, x, weights, biases: tuple(
        linear(site, x, weight, bias) for site, weight, bias in zip(sites, weights, biases)))
