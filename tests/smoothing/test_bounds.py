import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ancer_jax.smoothing import bounds


def exact_tail_at(p, successes, trials):
    """P(Bin(trials, p) >= successes) in 40 digits, for p below successes / trials: terms fall from the first on."""
    with mpmath.workdps(40):
        p = mpmath.mpf(float(p))
        term = mpmath.binomial(trials, successes) * p**successes * (1 - p) ** (trials - successes)
        tail = term
        for k in range(successes, trials):
            term *= mpmath.mpf(trials - k) / (k + 1) * p / (1 - p)
            tail += term
            if term <= tail * 1e-30:
                break
        return tail


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 0.05, 0.5])
@pytest.mark.parametrize(
    ("successes", "trials"),
    [
        (1, 1),
        (1, 2),
        (7, 10),
        (10, 10),
        (90, 100),
        (999, 1000),
        (51_234, 100_000),
        (99_999, 100_000),
        (100_000, 100_000),
    ],
)
def test_lower_is_the_exact_bound_rounded_down(successes, trials, alpha):
    """With 1e-6 of alpha to spare, for the error of SciPy's function: by 3e-6 at most."""
    p = bounds.clopper_pearson_lower(successes, trials, alpha)
    assert alpha * (1 - 3e-6) < exact_tail_at(p, successes, trials) < alpha / (1 + 9e-7)


@pytest.mark.parametrize("alpha", [1e-200, 1e-100, 1e-30, 1e-12])
@pytest.mark.parametrize("trials", [1, 100, 10**5, 2**31 - 1])
def test_few_successes_and_tiny_alpha_leave_room_for_the_error_of_scipy(trials, alpha):
    for successes in {1, min(2, trials), min(5, trials)}:
        tail = exact_tail_at(bounds.clopper_pearson_lower(successes, trials, alpha), successes, trials)
        assert tail < alpha / (1 + 5e-7)
        assert tail > alpha * (1 - 3e-6) or (tail == 0 and alpha < 1e-50)  # SciPy's inverse may give up: 0 is sound
    for lost in {0, min(1, trials), min(5, trials)}:  # the upper bound, of few votes that are lost
        upper = float(bounds.clopper_pearson_upper(lost, trials, alpha))
        assert upper == 1 or at_most(lost, trials, upper) <= alpha


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("alpha", [1e-201, 1e-320, "0.001", True, 1])
def test_an_alpha_that_is_too_small_or_no_real_number_is_refused(alpha):
    for function in (bounds.clopper_pearson_lower, bounds.clopper_pearson_upper, bounds.confidence_sequence_lower):
        with pytest.raises(ValueError, match="alpha must be"):
            function(5, 10, alpha)


@pytest.mark.parametrize("alpha", [1e-8, 1e-6, 1e-4, 1e-3, 0.05])
@pytest.mark.parametrize("trials", [10**5, 10**6, 10**8, 2**31 - 1])
def test_scipys_inverse_is_not_trusted_where_it_is_wrong(trials, alpha):
    """Around 999 failures SciPy 1.17's inverse breaks the bound by up to a factor of 674 in alpha."""
    for failures in (998, 999, 1000):
        p = bounds.clopper_pearson_lower(trials - failures, trials, alpha)
        assert alpha * (1 - 1e-3) <= at_most(failures, trials, 1 - float(p)) <= alpha
        q = bounds.clopper_pearson_upper(failures, trials, alpha)
        assert alpha * (1 - 1e-3) <= at_most(failures, trials, float(q)) <= alpha


def at_most(k, n, q):
    """P(Bin(n, q) <= k) in 40 digits, for q above k / n: terms fall from k down."""
    with mpmath.workdps(40):
        q = mpmath.mpf(q)
        factorials = mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
        term = mpmath.exp(factorials + k * mpmath.log(q) + (n - k) * mpmath.log1p(-q))
        tail = term
        for i in range(k, 0, -1):
            term *= i * (1 - q) / ((n - i + 1) * q)
            tail += term
        return tail


def test_ends():
    assert bounds.clopper_pearson_lower(0, 10, 0.05) == 0
    assert bounds.clopper_pearson_upper(10, 10, 0.05) == 1
    q = -np.expm1(np.log(0.001) / 1000)
    assert bounds.clopper_pearson_upper(0, 1000, 0.001) == pytest.approx(q, rel=1e-6)
    assert bounds.clopper_pearson_upper(0, 1000, 0.001) >= q


@given(st.integers(1, 10**7), st.data(), st.floats(1e-8, 0.5))
def test_upper_mirrors_lower(trials, data, alpha):
    successes = data.draw(st.integers(0, trials))
    upper = bounds.clopper_pearson_upper(successes, trials, alpha)
    lower = bounds.clopper_pearson_lower(trials - successes, trials, alpha)
    assert upper == pytest.approx(1 - lower, rel=1e-9, abs=1e-11)
    assert bounds.clopper_pearson_lower(successes, trials, alpha) <= successes / trials <= upper


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999])
def test_coverage(p):
    counts = np.random.default_rng(0).binomial(200, p, 20_000)
    wrong = int((bounds.clopper_pearson_lower(counts, 200, 0.05) > p).sum())
    assert scipy.stats.binomtest(wrong, 20_000, 0.05, alternative="greater").pvalue > 1e-3


# Probabilities of all classes; the one that is bounded below comes first.
PROBABILITIES = {
    "two classes": [0.6, 0.4],
    "the class is not the top": [0.2, 0.7, 0.1],
    "a tie for second": [0.4, 0.3, 0.3],
    "a hundred classes tie": [0.3, *[0.007] * 100],
    "a hundred classes nearly tie": [0.3, *(0.007 * np.linspace(0.98, 1.02, 100))],
    "a thousand classes": [0.2, *(0.8 / 999 * np.linspace(0.5, 1.5, 999))],
    "draws without a vote": [0.5, 0.3, 0.1, 0.1],
}


def most_of_others(counts, classes):
    """The largest count of another class than the first, and all votes for none of the `classes`."""
    return counts[:, 1:classes].max(axis=1) + counts[:, classes:].sum(axis=1)


@pytest.mark.parametrize("case", PROBABILITIES)
def test_separate_bounds_hold_together_however_many_classes_there_are(case):
    p, alpha, trials = np.array(PROBABILITIES[case]), 0.05, 300
    classes = len(p) - (case == "draws without a vote")
    counts = np.random.default_rng(1).multinomial(trials, p, 4000)
    runner_up = most_of_others(counts, classes)
    p_lower, p_b_upper = bounds.separate_bounds(counts[:, 0], runner_up, trials, alpha / 2)
    # Wherever the draws without a vote belong, no class is more probable than the largest one with all of them.
    highest = p[1:classes].max() + p[classes:].sum()
    below, above = p_lower > p[0], p_b_upper < highest
    for failed, allowed in ((below | above, alpha), (below, alpha / 2), (above, alpha / 2)):
        assert scipy.stats.binomtest(int(failed.sum()), len(counts), allowed, alternative="greater").pvalue > 1e-3
    assert below.any()


def test_separate_bounds_hold_for_every_three_probabilities():
    """Exactly: the probability of all counts of 12 draws with which a bound fails."""
    trials, alpha = 12, 0.1
    counts = np.array([(a, b, trials - a - b) for a in range(trials + 1) for b in range(trials + 1 - a)])
    bound = bounds.separate_bounds(counts[:, 0], counts[:, 1:].max(axis=1), trials, alpha)
    errors = []
    for a, b in np.random.default_rng(0).dirichlet(np.ones(3), 400)[:, :2]:
        wrong = (bound[0] > a) | (bound[1] < max(b, 1 - a - b))
        errors.append(scipy.stats.multinomial.pmf(counts[wrong], trials, [a, b, 1 - a - b]).sum())
    assert alpha < max(errors) <= 2 * alpha  # either bound alone fails with probability alpha at most


def test_separate_bounds_are_one_bound_below_and_one_above():
    votes, runner_up, trials = np.array([[400, 900, 0], [990, 500, 1]]), np.array([60, 20, 0]), np.array(1000)
    p_lower, p_b_upper = bounds.separate_bounds(votes[:1], runner_up, trials, 0.0005)
    np.testing.assert_array_equal(p_lower, bounds.clopper_pearson_lower(votes[:1], 1000, 0.0005))
    np.testing.assert_array_equal(p_b_upper[0], bounds.clopper_pearson_upper(runner_up, 1000, 0.0005))
    # All other votes are the runner-up's: what the class leaves, to the bit.
    p_lower, p_b_upper = bounds.separate_bounds(votes, trials - votes, trials, 0.0005)
    np.testing.assert_array_equal(p_b_upper, 1 - p_lower)
    # So few draws are missing that the bound from all of them is the smaller one.
    p_lower, p_b_upper = bounds.separate_bounds(500, 499, 1000, np.array([1e-3, 1e-9]))
    assert (p_b_upper <= 1 - p_lower).all()


@given(st.integers(0, 2000), st.integers(0, 2000))
@settings(max_examples=50)
def test_binomial_test_is_scipys(a, b):
    expected = scipy.stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert bounds.binomial_test(a, b) == pytest.approx(expected, rel=2e-6)
    assert bounds.binomial_test(a, b) >= expected * (1 - 1e-12)


def test_the_p_value_of_a_binomial_test_is_never_0():
    assert 0 < bounds.binomial_test(10**9, 0) < 1e-300


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, 0, 0.1), "trials must be at least 1, got 0"),
        ((3, 2, 0.1), "successes must be in"),
        ((-1, 2, 0.1), "successes must be in"),
        ((0.5, 2, 0.1), "successes must be integers"),
        ((1, 2, 0.0), "alpha must be in"),
        ((1, 2, 1.0), "alpha must be in"),
        ((1, 2, float("nan")), "alpha must be in"),
    ],
)
def test_arguments_out_of_range(arguments, text):
    for function in (bounds.clopper_pearson_lower, bounds.clopper_pearson_upper):
        with pytest.raises(ValueError, match=text):
            function(*arguments)


def test_counts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="votes and runner_up must not add up to more than trials"):
        bounds.separate_bounds(np.array([5, 5]), np.array([5, 6]), 10, 0.1)
    with pytest.raises(ValueError, match=r"successes must be in 0\.\.10, got -1"):
        bounds.separate_bounds(5, -1, 10, 0.1)
    with pytest.raises(ValueError, match="runner_up must be integers"):
        bounds.separate_bounds(5, 1.5, 10, 0.1)
    with pytest.raises(ValueError, match="negative"):
        bounds.binomial_test(-1, 3)


def grid(trials):
    """2,000 counts (one shape, one compilation): all up to n = 1999, else the ends densely and a grid between."""
    if trials < 2000:
        return np.resize(np.arange(trials + 1), 2000)
    ends = np.concatenate([np.arange(300), np.rint(np.geomspace(300, trials, 400)).astype(int)])
    between = np.random.default_rng(trials).integers(0, trials + 1, 600)
    return np.concatenate([ends, trials - ends, between])


lower_traced = jax.jit(bounds.clopper_pearson_lower_traced)
upper_traced = jax.jit(bounds.clopper_pearson_upper_traced)
slopes_of_the_lower_bound = jax.jit(jax.grad(bounds.clopper_pearson_lower_traced, argnums=(0, 1, 2)))
TRIALS = [1, 2, 3, 7, 50, 100, 1000, 1999, 10_000, 100_000, 10**6, 10**7, 2**24 - 1]


@pytest.mark.parametrize("alpha", [1e-9, 1e-6, 1e-3, 0.05, 0.5])
@pytest.mark.parametrize("trials", TRIALS)
def test_traced_twin_is_never_above_and_close(trials, alpha):
    k = grid(trials)
    p, exact = np.float64(lower_traced(k, trials, alpha)), bounds.clopper_pearson_lower(k, trials, alpha)
    assert ((p >= 0) & (p <= exact)).all()
    assert (1 - p <= (1 - exact) * 1.01 + 2.0**-23).all()
    q, exact = np.float64(upper_traced(k, trials, alpha)), bounds.clopper_pearson_upper(k, trials, alpha)
    assert ((q >= exact) | (q == np.float32(1))).all()
    assert (q <= exact * 1.01).all()


@pytest.mark.parametrize(("k", "n"), [(900.0, 1000.0), (600.0, 1000.0), (99_900.0, 1e5), (3.0, 10.0), (5e6, 1e7)])
def test_gradient_of_the_traced_twin_is_the_implicit_derivative(k, n):
    alpha = 1e-3
    exact = lambda k, n, alpha: scipy.special.betaincinv(k, n - k + 1, alpha)
    step = 1e-4 * k
    expected = (
        (exact(k + step, n, alpha) - exact(k - step, n, alpha)) / (2 * step),
        (exact(k, n + step, alpha) - exact(k, n - step, alpha)) / (2 * step),
        (exact(k, n, 1.01e-3) - exact(k, n, 0.99e-3)) / 0.02e-3,
    )
    gradient = slopes_of_the_lower_bound(k, n, alpha)
    np.testing.assert_allclose(gradient, expected, rtol=0.02)


def test_gradients_are_finite_at_the_ends():
    for successes in (0.0, 0.1, 0.5, 1.0, 999.0, 999.5, 1000.0):
        assert np.isfinite(slopes_of_the_lower_bound(successes, 1000.0, 1e-3)).all()


def test_traced_twin_gives_nothing_away_where_it_cannot_count():
    successes = np.array([2**24, 5, -1, 11, 5, 5, 9])
    trials = np.array([2**24, 0, 10, 10, 10, 10, 10])
    alpha = np.array([0.001, 0.001, 0.001, 0.001, np.nan, 1.5, 1e-12])
    assert (lower_traced(successes, trials, alpha) == 0).all()


def test_traced_twin_keeps_its_digits_where_successes_are_few():
    rng = np.random.default_rng(0)
    trials = rng.integers(2**22, 2**24, 2000)
    successes = (trials * rng.uniform(0, 0.1, 2000)).astype(int)
    alpha = 10 ** rng.uniform(-9, np.log10(0.5), 2000)
    exact = bounds.clopper_pearson_lower(successes, trials, alpha)
    assert (np.float64(lower_traced(successes, trials, alpha)) <= exact).all()


@pytest.mark.parametrize(
    ("successes", "trials"),
    [
        (jnp.uint8(10), 300),
        (jnp.int16(100), 70_000),
        (np.int64(100), np.int64(2**32 + 100)),
        (jnp.bfloat16(1000), 1001),
    ],
)
def test_traced_twin_does_not_wrap_integers(successes, trials):
    exact = bounds.clopper_pearson_lower(int(successes), int(trials), 0.001)
    assert bounds.clopper_pearson_lower_traced(successes, trials, 0.001) <= exact


def test_traced_twin_under_vmap_is_elementwise():
    k = jnp.arange(0, 101, 10)
    one_by_one = [float(lower_traced(int(i), 100, 0.01)) for i in k]
    batched = jax.vmap(lambda k: lower_traced(k, 100, 0.01))(k)
    np.testing.assert_allclose(batched, one_by_one, rtol=1e-5)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_a_confidence_sequence_holds_after_every_draw(p):
    rng, alpha = np.random.default_rng(0), 0.05
    counts = (rng.random((400, 2_000)) < p).cumsum(axis=1)
    # Sequences meet: the bound of each pair of a count and its trials is computed once.
    pairs, places = np.unique(counts * 2_001 + np.arange(1, 2_001), return_inverse=True)
    above = bounds.confidence_sequence_lower(pairs // 2_001, pairs % 2_001, alpha) > p
    failures = int(above[places.reshape(counts.shape)].any(axis=1).sum())
    assert failures > 0
    assert scipy.stats.binomtest(failures, 400, alpha, alternative="greater").pvalue >= 1e-4


def test_a_confidence_sequence_is_where_the_martingale_reaches_one_over_alpha():
    counts, trials = np.array([0, 1, 50, 900, 1_000, 10**7]), np.array([10, 1, 100, 1_000, 1_000, 10**7])
    found = bounds.confidence_sequence_lower(counts, trials, 0.001)
    assert (found <= bounds.clopper_pearson_lower(counts, trials, 0.001)).all() and found[0] == 0
    beta = scipy.special.betaln
    for k, t, p in zip(counts[1:], trials[1:], found[1:], strict=True):
        log_m = beta(k + 0.5, t - k + 0.5) - beta(0.5, 0.5) - scipy.special.xlogy(k, p)
        assert log_m - scipy.special.xlog1py(t - k, -p) == pytest.approx(np.log(1000), rel=1e-5)
    with pytest.raises(ValueError, match="successes must be in"):
        bounds.confidence_sequence_lower(11, 10, 0.001)
