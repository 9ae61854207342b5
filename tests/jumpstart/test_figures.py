"""Status maps and heat-maps: the contents of every cell, the order of the layers, and the limits of the figure."""

from collections import OrderedDict

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jprune.jumpstart import point_map, unit_map


def shown(figure):
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


UNITS = OrderedDict(second=np.array([-1, 0, 1], np.int8), first=np.array([1], np.int8))


def test_a_unit_map_has_a_column_a_layer_in_call_order_and_blanks_where_a_layer_is_narrow():
    figure = unit_map(UNITS)
    np.testing.assert_array_equal(shown(figure), [[-1, 1], [0, np.nan], [1, np.nan]])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["second", "first"]
    assert legend(figure) == ["dead 25%", "linear 25%", "nonlinear 50%"]


def test_points_are_sorted_by_their_first_dead_layer_and_then_by_how_often_they_are_linear():
    table = np.array([[0, 1, -1, 1], [0, 0, 1, -1]], np.int8)  # (layers, points)
    figure = point_map(list(table))
    np.testing.assert_array_equal(shown(figure), [[-1, 1], [1, -1], [1, 0], [0, 0]])
    assert legend(figure) == ["dead 25%", "linear 38%", "nonlinear 38%"]


def test_maps_need_the_order_of_the_layers():
    for draw in (unit_map, point_map):
        with pytest.raises(TypeError, match="loses their order under jit"):
            draw({"a": np.zeros(2, np.int8), "b": np.zeros(2, np.int8)})


def test_a_point_map_needs_the_same_points_in_every_layer():
    with pytest.raises(ValueError, match=r"shape \(1,\) in layer '1' and \(3,\) in layer '0'"):
        point_map([np.zeros(3, np.int8), np.zeros(1, np.int8)])


@pytest.mark.parametrize("depth", [1, 30])
def test_title_and_legend_stay_inside_the_figure(depth):
    figure = unit_map([np.zeros(4, np.int8)] * depth, "Units: relu (conv), depth 1, width 4")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for artist in (figure.axes[0]._left_title, figure.axes[0].get_legend()):
        box, width = artist.get_window_extent(canvas.get_renderer()), figure.bbox.width
        assert box.x0 >= 0
        assert box.x1 <= width
