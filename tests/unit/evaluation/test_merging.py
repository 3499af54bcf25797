"""NMS and soft-NMS, against cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megdet_hpc.evaluation.merging import hard_nms, soft_nms

# Three boxes of 10 x 10 in a row, and one of another class on the first. IoU of 0 and 1: 8 x 10 / 120 = 2/3; of 0 and
# 2: 5 x 10 / 150 = 1/3; of 1 and 2: 7 x 10 / 130 = 7/13.
BOXES = np.array([[0, 0, 10, 10], [2, 0, 12, 10], [5, 0, 15, 10], [0, 0, 10, 10]], np.float64)
SCORES = np.array([0.9, 0.8, 0.7, 0.6])
LABELS = np.array([1, 1, 1, 2])
IOU_01, IOU_02, IOU_12 = 2 / 3, 1 / 3, 7 / 13


def test_nms_drops_the_weaker_of_a_class() -> None:
    assert hard_nms(BOXES, SCORES, LABELS, 0.5).tolist() == [0, 2, 3]
    assert hard_nms(BOXES, SCORES, LABELS, 0.3).tolist() == [0, 3]


def test_linear_soft_nms_lowers_what_overlaps_enough() -> None:
    kept, scores = soft_nms(BOXES, SCORES, LABELS, kind="linear", iou=0.5, sigma=0.5, least_score=0)
    # after box 0 the scores are 0.8 / 3 and 0.7; box 2 is next and lowers box 1 again
    assert kept.tolist() == [0, 2, 3, 1]
    assert scores == pytest.approx([0.9, 0.7, 0.6, 0.8 * (1 - IOU_01) * (1 - IOU_12)], rel=1e-12)


def test_gaussian_soft_nms_lowers_all_of_a_class() -> None:
    kept, scores = soft_nms(BOXES, SCORES, LABELS, kind="gaussian", iou=0.5, sigma=0.5, least_score=0)
    second = 0.7 * math.exp(-(IOU_02**2) / 0.5)  # 0.5605, above 0.8 exp(-8/9) = 0.3289
    third = 0.8 * math.exp(-(IOU_01**2) / 0.5) * math.exp(-(IOU_12**2) / 0.5)
    assert kept.tolist() == [0, 3, 2, 1]
    assert scores == pytest.approx([0.9, 0.6, second, third], rel=1e-12)


def test_soft_nms_drops_low_scores_and_takes_boxes_without_area() -> None:
    kept, _ = soft_nms(BOXES, SCORES, LABELS, kind="gaussian", iou=0.5, sigma=0.5, least_score=0.2)
    assert kept.tolist() == [0, 3, 2]
    flat = np.zeros((2, 4))
    kept, scores = soft_nms(
        flat, np.array([0.5, 0.4]), np.array([1, 1]), kind="linear", iou=0.5, sigma=0.5, least_score=0
    )
    assert kept.tolist() == [0, 1] and scores.tolist() == [0.5, 0.4]
    nothing, _ = soft_nms(BOXES[:0], SCORES[:0], LABELS[:0], kind="linear", iou=0.5, sigma=0.5, least_score=0)
    assert len(nothing) == 0
