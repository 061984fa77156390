"""The cases of the CPU tests on two GPUs and NCCL. All FULL: bit for bit; else: to 1e-4 (float32, no TF32)."""

import pytest
import test_faults
import test_features
import test_parity
import test_report

pytestmark = pytest.mark.gpu

test_all_full_is_the_two_branches_one_by_one = test_parity.test_all_full_is_the_two_branches_one_by_one
test_a_fixed_plan_is_the_oracle = test_parity.test_a_fixed_plan_is_the_oracle
test_a_plan_with_skipped_steps_is_the_oracle = test_parity.test_a_plan_with_skipped_steps_is_the_oracle
test_paper_and_mixed_is_the_oracle = test_parity.test_paper_and_mixed_is_the_oracle
test_arguments_of_a_call = test_features.test_arguments_of_a_call
test_bytes_sent_are_those_counted_by_hand = test_report.test_bytes_sent_are_those_counted_by_hand


def test_ranks_that_differ(pair):
    for kind, message, evaluations, _ in pair.run(test_faults.differ, "noise"):
        assert (kind, evaluations) == ("RuntimeError", 0)
        assert "initial noise" in message


@pytest.mark.parametrize("fields", [{"policy": "cfg"}, {"plan": test_faults.PLAN}], ids=str)
def test_drift(pair, fields):
    noticed = 4 if "policy" in fields else 6
    for kind, message, *_ in pair.run(test_faults.drift, 3, fields):
        assert kind == "RunOver"
        assert f"at step {noticed} the ranks' latents are no longer the same" in message
