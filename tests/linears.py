"""What tests of the decoder share: a LinearFn from a function of one site."""


def site_by_site(linear):
    """linear(site, x, weight, bias) -> y, as the LinearFn that calls it for each site in turn."""

    def together(sites, x, weights, biases):
        return tuple(linear(site, x, weight, bias) for site, weight, bias in zip(sites, weights, biases))

    return together
