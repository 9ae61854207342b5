"""Programs in which a wrong assumption would give other outputs without an error."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jprune
from jprune.pruning.structured import removal
from jprune.pruning.structured.budgets import cost_of
from jprune.trees import flatten
from tests.pruning.structured.models import _Draw

pytestmark = pytest.mark.usefixtures("usual_promotion")


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def window(h, first, function, padding="VALID"):
    return lax.reduce_window(h, first, function, (1, 2, 1), (1, 2, 1), padding)


def smoothed(h):
    """A moving sum along axis 1, with the channels as a part of the batch."""
    rows = jnp.swapaxes(h, 1, 2).reshape(12, 1, 4)
    return lax.conv_general_dilated(rows, jnp.ones((1, 1, 3)), (1,), "SAME").reshape(2, 6, 4).swapaxes(1, 2)


def added_to_identity(h):
    step = lambda carry, _: ((carry[0] @ carry[1], carry[1] + 1.0), None)
    return lax.scan(step, (jax.nn.sigmoid(h), jnp.eye(6)), None, length=2)[0][0]


@pytest.mark.parametrize(
    ("inner", "exact"),
    {
        "padded with ones along another axis": (
            lambda h: jnp.pad(h, ((0, 0), (1, 0), (0, 0)), constant_values=1),
            False,
        ),
        "padded with zeros": (lambda h: jnp.pad(h, ((0, 0), (1, 0), (0, 0))), True),
        "cropped": (lambda h: lax.pad(h, 1.0, ((0, 0, 0), (-1, 0, 0), (0, 0, 0))), True),
        "a window's sum that starts from 1": (lambda h: window(h, 1.0, lax.add), False),
        "a window's own function": (lambda h: window(h, 0.0, lambda a, b: a + b + 1), False),
        "a window's maximum": (lambda h: window(h, -jnp.inf, lax.max, ((0, 0), (1, 0), (0, 0))), True),
        "a window that has only padding": (lambda h: window(h, -jnp.inf, lax.max, ((0, 0), (2, 0), (0, 0))), False),
        "a number clamped between 0 and another": (
            lambda h: jax.nn.sigmoid(h) * lax.clamp(0.0, jnp.full_like(h, 5), 6.0),
            False,
        ),
        "a function applied to some of it": (lambda h: h.at[0].apply(jnp.exp), False),
        "some of it set to itself": (lambda h: h.at[0].set(h[1]), True),
        "the angle of (0, -0)": (lambda h: jnp.arctan2(h, -h), False),
        "the number next to 0": (lambda h: jnp.nextafter(h, 1.0), False),
        "a product with what is an identity matrix in the first round only": (added_to_identity, False),
        "sorted along another axis": (lambda h: jnp.sort(h, axis=1), True),
        "the largest along another axis": (lambda h: lax.top_k(h.swapaxes(1, 2), 2)[0].swapaxes(1, 2), True),
        "their places along another axis": (lambda h: lax.top_k(h.swapaxes(1, 2), 2)[1].swapaxes(1, 2), False),
        "a Fourier transform of another axis": (lambda h: jnp.fft.fft(h, axis=1).real, True),
        "convolved with its channels in the batch": (smoothed, True),
        "divided by a quantile, which is 0": (
            lambda h: h / jnp.quantile(jnp.abs(h), 0.9, axis=1, keepdims=True),
            False,
        ),
        "divided by a median, which is 0": (lambda h: h / jnp.median(jnp.abs(h), axis=1, keepdims=True), False),
        "acosh of 0 is NaN": (lambda h: h * jnp.arccosh(h), False),
        "zeta of 0 is not finite": (lambda h: h * jax.scipy.special.zeta(2.0, h), False),
        "above a positive number": (lambda h: (h > 1).astype(jnp.float32), True),
        "above a negative number": (lambda h: (h > -1).astype(jnp.float32), False),
        "0 is at least 0": (lambda h: (h >= 0).astype(jnp.float32), False),
        "1 more where it is positive": (lambda h: jnp.where(h > 0, h + 1, 0.0), True),
        "1 more where it is not positive": (lambda h: jnp.where(h > 0, 0.0, h + 1), False),
    }.values(),
)
def test_a_sum_over_channels_is_exact_only_where_masked_ones_are_zero(inner, exact):
    graph = jprune.trace_model(lambda p, x: inner(x @ p["w"]).sum(-1), {"w": shape(3, 6)}, shape(2, 4, 3))
    (group,) = graph.channels
    assert group.exact == exact


@pytest.mark.parametrize("product", ["ij,ij->i", "ij,bij->bi", "ii,bij->bj"])
def test_a_product_with_an_identity_matrix_along_several_axes(product):
    """The diagonal is taken, not the whole matrix."""
    w = shape(6, 6) if product.startswith("ij,ij") else shape(2, 6, 6)
    graph = jprune.trace_model(lambda p: jnp.einsum(product, jnp.eye(6), p["w"]), {"w": w})
    assert [value.shape for value in graph.program.outputs] == [(6,) if w.shape == (6, 6) else (2, 6)]


def halved(graph, params, keep=None):
    """Masks without half of each group's channels, or with ``keep`` of them, and the masked parameters, by numpy."""
    paths, leaves, treedef = flatten(params)
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in zip(paths, leaves, strict=True)}
    for group in graph.channels:
        for member in group.members:
            gone = member.indices[: group.size // 2 if keep is None else group.size - keep].reshape(-1)
            np.moveaxis(masks[member.path], member.axis, 0)[gone] = False
    masked = [jnp.asarray(np.where(masks[path], leaf, 0)) for path, leaf in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(treedef, list(map(jnp.asarray, masks.values()))), jax.tree.unflatten(treedef, masked)


def two_layers():
    d = _Draw()
    return {"a": d(3, 8), "b": d(8, 2)}, d(4, 3)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (
            lambda h: (s := jnp.sin(h)) + (h if h.shape[-1] > 4 else s),
            "add reads other arrays than at the full shapes",
        ),
        (
            lambda h: (jnp.sin(h), jnp.cos(h))[h.shape[-1] <= 4],
            "dot_general reads other arrays than at the full shapes",
        ),
        (
            lambda h: h.astype(jnp.float16 if h.shape[-1] > 4 else jnp.bfloat16),
            "convert_element_type: expected dtype float16, the code gives bfloat16",
        ),
        (
            lambda h: jnp.concatenate([jnp.tanh(part) for part in jnp.split(h, h.shape[-1] // 2, -1)], -1),
            "split: expected 4 outputs, the code gives 2",
        ),
        (
            lambda h: jnp.concatenate([h] * (h.shape[-1] // 2), -1).reshape(4, -1, h.shape[-1]).sum(1),
            "concatenate: expected 4 inputs, the code gives 2",
        ),
    ],
)
def test_code_that_computes_something_else_at_the_smaller_size_is_named(inner, message):
    params, x = two_layers()
    graph = jprune.trace_model(lambda p, x: inner(x @ p["a"]) @ p["b"], params, x)
    small = jprune.remove_channels(graph, params, halved(graph, params)[0])
    assert small.table.differences[0].endswith(f"`: {message}")  # after the line of code


def test_a_size_of_an_array_that_nothing_reads_does_not_matter():
    """The gradient of a ReLU inside a model computes zeros that it does not use, which counted as a difference."""
    params, x = two_layers()
    force = jax.grad(lambda h: jnp.sum(jax.nn.relu(h) ** 2))
    graph = jprune.trace_model(lambda p, x: force(x @ p["a"]) @ p["b"], params, x)
    small = jprune.remove_channels(graph, params, halved(graph, params)[0], check=x)
    assert small.table.differences == ()


def test_code_that_returns_another_array_at_the_smaller_size_is_named():
    params, x = two_layers()

    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        y = h @ p["b"], h @ (2 * p["b"])
        return y if h.shape[-1] > 4 else y[::-1]

    graph = jprune.trace_model(apply, params, x)
    small = jprune.remove_channels(graph, params, halved(graph, params)[0])
    assert "returns other arrays" in small.table.differences[0]


def test_code_that_indexes_stacked_layers_by_a_traced_number_serves():
    """The size of the axes that are not indexed is in the program, added to an index of 0 if that were negative."""
    d = _Draw()
    params = {"a": d(3, 6), "layers": d(2, 6, 6), "b": d(6, 2)}

    def apply(p, x):
        return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["layers"][i]), x @ p["a"]) @ p["b"]

    graph = jprune.trace_model(apply, params, d(4, 3))
    assert jprune.remove_channels(graph, params, halved(graph, params)[0]).table.differences == ()


def test_an_argument_that_equals_another_is_not_that_argument():
    params, x = two_layers()
    apply = lambda p, x, flag: jnp.tanh(x @ p["a"]) @ p["b"] * (2.0 if flag is True else 1.0)
    graph = jprune.trace_model(apply, params, x, 1)
    masks, masked = halved(graph, params)
    small = jprune.remove_channels(graph, params, masks)
    both = jax.jit(lambda p, q: (apply(p, x, True), small.apply(q, x, True)))
    np.testing.assert_allclose(*both(masked, small.params), atol=1e-5)


def test_two_leaves_with_one_path_are_refused():
    params = {"a/b": jnp.ones((3, 4)), "a": {"b": jnp.ones((4, 2))}}
    for call in (
        lambda: jprune.trace_model(lambda p, x: x @ p["a/b"] @ p["a"]["b"], params, jnp.ones((1, 3))),
        lambda: jprune.apply_masks(params, jax.tree.map(lambda w: w > 0, params)),
    ):
        with pytest.raises(ValueError, match="params has two leaves with the path 'a/b'; rename"):
            call()


def test_a_moment_is_cut_with_its_own_parameter_where_a_layer_has_the_moments_name():
    """The moment ``mu/kernel`` belongs to ``kernel``, and ``mu/mu/kernel`` to the layer ``mu``."""
    d = _Draw()
    params = {"kernel": d(6, 6), "mu": {"kernel": d(6, 6)}, "out": d(6, 2)}
    apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["kernel"]) @ p["mu"]["kernel"]) @ p["out"]
    graph = jprune.trace_model(apply, params, d(2, 6))
    masks, _ = halved(graph, params)
    adam, _ = optax.adam(0.1).init(params)
    small = jprune.remove_channels(graph, params, masks, also=({"0": adam._replace(mu=params, nu=params)},))
    chex.assert_trees_all_equal(small.also[0]["0"].mu, small.params)
    chex.assert_trees_all_equal(small.also[0]["0"].nu, small.params)


@jax.custom_jvp
def ordered_jvp(z):
    return z * z, jnp.argmax(jnp.abs(z), axis=0)


@ordered_jvp.defjvp
def _(primals, tangents):
    square, order = ordered_jvp(*primals)
    return (square, order), (3 * primals[0] * tangents[0], np.zeros(order.shape, jax.dtypes.float0))


@jax.custom_vjp
def ordered_vjp(z):
    return ordered_jvp(z)


ordered_vjp.defvjp(lambda z: (ordered_vjp(z), z), lambda z, g: (3 * z * g[0],))


@pytest.mark.parametrize("function", [ordered_jvp, ordered_vjp])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_derivative_rules_of_complex_channels_and_of_integer_results(function, dtype):
    params, x = two_layers()

    def apply(p, x):
        square, order = function(jnp.asarray(x @ p["a"], dtype) * dtype(1 + 1j if dtype == np.complex64 else 1))
        return jnp.abs((square + order) @ p["b"])

    graph = jprune.trace_model(apply, params, x)
    masks, masked = halved(graph, params)
    small = jprune.remove_channels(graph, params, masks)
    expected = jax.grad(lambda p: apply(p, x).sum())(masked)
    found = jax.grad(lambda p: small.apply(p, x).sum())(small.params)
    chex.assert_trees_all_close(found, removal.cut_leaves(expected, small.kept), atol=1e-4)


def test_weak_types_stay_weak():
    """A number without a dtype of its own leaves bfloat16 as it is; a float32 array of one number does not."""
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), two_layers())
    params["scale"] = jnp.full(8, 0.5)  # weak
    apply = lambda p, x, t: jnp.tanh(x @ p["a"]) * p["scale"] * t @ p["b"]
    graph = jprune.trace_model(apply, params, x, jnp.asarray(2.0))
    small = jprune.remove_channels(graph, params, halved(graph, params)[0])
    assert small.table.differences == ()
    for number in (jnp.asarray(2.0), jnp.float32(2.0)):
        assert small.apply(small.params, x, number).dtype == apply(params, x, number).dtype


def test_complex_outputs_are_compared_too():
    params, x = two_layers()
    params["b"] = jnp.asarray(np.asarray(params["b"]) * np.complex64(1 + 2j))

    def apply(p, x):
        h = jax.nn.sigmoid(x @ p["a"])
        return h / h.sum(-1, keepdims=True) @ p["b"]

    graph = jprune.trace_model(apply, params, x)
    masks, _ = halved(graph, params)
    small = jprune.remove_channels(graph, params, masks, check=x)
    assert small.table.groups[0].difference > 0.01


def maxima_and_places(h):
    """Maxima along axis 1 and their places, as of pooling that is undone later."""

    def larger(one, other):
        return tuple(jnp.where(one[0] > other[0], *pair) for pair in zip(one, other, strict=True))

    places = lax.broadcasted_iota(jnp.int32, h.shape, 1)
    return lax.reduce_window((h, places), (-jnp.inf, 0), larger, (1, 2, 1), (1, 2, 1), "VALID")


def matrices_scanned(h):
    """Products of the rows so far, by an associative scan whose last round has no pairs left."""
    pair = lambda one, other: (one.reshape(-1, 3, 2) * other.reshape(-1, 3, 2)).reshape(one.shape)
    return lax.associative_scan(pair, h, axis=1).sum(-1)


def halved_until_small(v):
    """A loop whose condition, under vmap, is an array."""
    return lax.while_loop(lambda v: jnp.sum(v**2) > 0.5, lambda v: v / 2, v)


@pytest.mark.parametrize(
    ("inner", "hidden"),
    {
        "a window over two arrays": (lambda h: [y.sum(-1) for y in maxima_and_places(h)], 6),
        "one channel repeated": (lambda h: jnp.tile(h[..., :1], (1, 1, 4)), 5),
        "joined with an empty array that was reshaped": (
            lambda h: jnp.concatenate([h[:, :0].reshape(0, 6), h.reshape(8, 6)]).sum(-1),
            6,
        ),
        "a scan over pairs of matrices, of which it takes none at the end": (matrices_scanned, 3),
        "the largest of each channel set to 0": (
            lambda h: jax.vmap(lambda v: v.at[0, jnp.argmax(v[0])].set(0.0), -1, -1)(h).sum(-1),
            6,
        ),
        "one channel, whose axis a reshape drops": (lambda h: h[..., :1].reshape(2, 4), 5),
        "a loop for each sample": (lambda h: jax.vmap(halved_until_small)(h).sum(-1), 6),
        "a loop for each channel": (lambda h: jax.vmap(halved_until_small, -1, -1)(h).sum(-1), 6),
        "samples of a distribution of each channel": (
            lambda h: jax.random.gamma(jax.random.key(0), jnp.exp(h)).sum(-1),
            0,
        ),
        "coordinates that a gather reads": (
            lambda h: lax.gather(
                jnp.ones((3,) * 6),
                h.astype(jnp.int32),
                lax.GatherDimensionNumbers((), (*range(6),), (*range(6),)),
                (1,) * 6,
            ),
            0,
        ),
        "coordinates that a scatter writes to": (
            lambda h: lax.scatter_add(
                jnp.ones((3,) * 6),
                h.astype(jnp.int32),
                h[..., 0],
                lax.ScatterDimensionNumbers((), (*range(6),), (*range(6),)),
            ),
            0,
        ),
    }.values(),
)
def test_channels_are_removed_only_where_every_array_can_lose_them(inner, hidden):
    """Of the 6 channels of a layer as many can be removed as the operation leaves; the program runs without some."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 6)), jnp.float32), "v": jnp.ones((6, 2))}
    x = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)

    def apply(p, x):
        h = x @ p["w"]
        return h @ p["v"], inner(h)

    graph = jprune.trace_model(apply, params, x)
    assert sum(group.size for group in graph.channels) == hidden
    if hidden:
        masks, _ = halved(graph, params)
        small = jprune.remove_channels(graph, params, masks, check=x)
        chex.assert_trees_all_equal_shapes(small.apply(small.params, x), apply(params, x))


def test_rows_are_assigned_to_experts_by_number_and_are_never_removed():
    """A channel of the layer before would shift the rows of all later experts."""
    sizes = np.array([5, 3], np.int32)
    params = {"rows": shape(8, 6), "experts": shape(2, 6, 4), "mixed": shape(8, 2)}
    graph = jprune.trace_model(lambda p: lax.ragged_dot(p["rows"], p["experts"], sizes).T @ p["mixed"], params)
    assert [group.size for group in graph.channels] == [6]
    assert graph.frozen["rows", 0] == "its indices are assigned to experts by their number"


@pytest.mark.parametrize(("kernel", "exact"), [(lambda w: w, True), (jnp.exp, False)])
def test_products_with_experts_are_exact_where_one_operand_is_zero(kernel, exact):
    sizes = np.array([3, 1], np.int32)
    graph = jprune.trace_model(
        lambda p, x: lax.ragged_dot(jax.nn.sigmoid(x @ p["w"]), kernel(p["experts"]), sizes),
        {"w": shape(3, 6), "experts": shape(2, 6, 4)},
        shape(4, 3),
    )
    (group,) = graph.channels
    assert group.exact == exact


def test_multiply_adds_of_experts_and_of_devices_count_in_budgets():
    """4 rows of 5 times (5, 8) and (8, 2) per expert; 2 rows on each of 2 devices times (3, 6)."""
    sizes = np.array([2, 1, 1], np.int32)
    rows = lambda p, x: lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)
    experts = jprune.trace_model(rows, {"up": shape(3, 5, 8), "down": shape(3, 8, 2)}, shape(4, 5))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    devices = jprune.trace_model(lambda p, x: split(p["w"], x), {"w": shape(3, 6)}, shape(4, 3))
    for graph, expected in ((experts, 4 * 5 * 8 + 4 * 8 * 2), (devices, 4 * 3 * 6)):
        cost = cost_of(graph, graph.channels, "multiply_adds")
        assert cost.after(np.zeros(len(cost.classes), bool)) == sum(graph.multiply_adds.values()) == expected


def test_multiply_adds_of_a_convolution_of_a_parameter_with_data_count_in_both_tables():
    """2 templates of length 8 with 8 channels, times a window of 3 and 8 channels, at 8 positions for 8 outputs."""
    apply = lambda p, x: lax.conv_general_dilated(p["t"], x, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    with pytest.warns(UserWarning, match="'conv_general_dilated' is not supported"):
        graph = jprune.trace_model(apply, {"t": shape(2, 8, 8)}, shape(3, 8, 8))
    assert graph.other_multiply_adds == 2 * 8 * 8 * 3 * 8
    assert cost_of(graph, graph.channels, "multiply_adds").after(np.zeros(0, bool)) == 2 * 8 * 8 * 3 * 8


def test_shard_map_runs_on_its_devices():
    """Each device subtracts the mean of its own examples, and the mean of all of them is added."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def local(p, x):
        h = jax.nn.relu(x @ p["a"])
        return (h - h.mean(0) + lax.pmean(h.mean(0), "d")) @ p["b"]

    apply = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    params, _ = two_layers()
    x = _Draw(1)(8, 3)
    graph = jprune.trace_model(apply, params, x)
    masks, masked = halved(graph, params)
    small = jprune.remove_channels(graph, params, masks)
    loss = lambda f: lambda p, x: jnp.sum(jnp.sin(f(p, x)))
    both = jax.jit(lambda p, q: (jax.value_and_grad(loss(apply))(p, x), jax.value_and_grad(loss(small.apply))(q, x)))
    (expected, grads), (found, small_grads) = both(masked, small.params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    chex.assert_trees_all_close(small_grads["b"], grads["b"][np.flatnonzero(small.kept["b"][0])], atol=1e-5)


def test_a_constraint_that_the_mesh_cannot_divide_is_dropped_and_named():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    params, x = two_layers()

    def apply(p, x):
        return lax.with_sharding_constraint(jnp.tanh(x @ p["a"]), NamedSharding(mesh, P(None, "d"))) @ p["b"]

    graph = jprune.trace_model(apply, params, x)
    masks, masked = halved(graph, params, keep=3)
    small = jprune.remove_channels(graph, params, masks)
    np.testing.assert_allclose(jax.jit(small.apply)(small.params, x), jax.jit(apply)(masked, x), atol=1e-5)
    assert "the mesh does not divide the shape (4, 3)" in small.table.differences[0]


def test_inputs_on_a_mesh_with_explicit_axes():
    """The program is traced with the placement of its inputs, also where it differs from the one of the trace."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    params, x = two_layers()
    apply = lambda p, x: jax.nn.relu(jnp.dot(x, p["a"])) @ p["b"]
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("d", None)))
        for traced in (x, split):
            graph = jprune.trace_model(apply, params, traced)
            masks, masked = halved(graph, params)
            small = jprune.remove_channels(graph, params, masks)
            out = jax.jit(small.apply)(small.params, split)
            assert out.sharding.spec == P("d", None)
            np.testing.assert_allclose(
                out, np.maximum(np.asarray(x) @ masked["a"], 0) @ np.asarray(masked["b"]), atol=1e-5
            )


def test_a_group_of_which_prune_is_given_a_part_is_refused():
    params, x = two_layers()
    graph = jprune.trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x)
    link = jprune.prune(jprune.magnitude(where=graph), {1: 0.5}, selection=jprune.structured(graph))
    tx = optax.multi_transform({"one": link, "other": optax.sgd(0.1)}, {"a": "one", "b": "other"})
    with pytest.raises(
        ValueError, match=r"no leaf 'b', which loses .* apply prune to all parameters, after optax.masked"
    ):
        tx.init(params)


def test_masks_that_an_optimizer_has_computed_with_are_refused():
    """In contrib.sam the state of what it wraps is combined from two, which turns masks into integers."""
    params, _ = two_layers()
    link = jprune.prune(jprune.magnitude(where=lambda path, leaf: True), {1: 0.5})
    state = link.init(params)
    state = state._replace(masks=jax.tree.map(lambda mask: mask.astype(jnp.int32), state.masks))
    with pytest.raises(
        TypeError, match=r"mask at 'a' has dtype int32.*optax.chain\(optax.contrib.sam\(...\), jprune.prune"
    ):
        link.update(params, state, params)
