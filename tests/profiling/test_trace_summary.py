"""What a trace says: on a real one of a CPU, and on such as a GPU and a TPU leave, written by hand."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from runner.profiling.operations import StepOperations, classify_name, classify_operations
from runner.profiling.trace_summary import summarize_profile, summarize_trace

PROGRAM = """HloModule jit_train_step, is_scheduled=true

%fused_computation (param_0: f32[8], param_1: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %dot.7 = f32[8]{0} dot(%param_0, %param_1), lhs_contracting_dims={0}
}

fused_computation.1 (param_0.1: f32[8,4]) -> f32[4,8] {
  param_0.1 = f32[8,4]{1,0} parameter(0)
  ROOT transpose.2 = f32[4,8]{1,0} transpose(param_0.1), dimensions={1,0}
}

%fused_computation.2 (param_0.2: f32[8]) -> f32[8] {
  %param_0.2 = f32[8]{0} parameter(0)
  %copy.9 = f32[8]{0} copy(%param_0.2)
  ROOT %add.3 = f32[8]{0} add(%copy.9, %param_0.2)
}

ENTRY %main.5 (Arg_0: f32[8], Arg_1: (f32[8], s32[])) -> (f32[8], s32[]) {
  %Arg_0 = f32[8]{0:T(256)} parameter(0)
  %gemm_fusion = f32[8]{0} fusion(%Arg_0, %Arg_0), kind=kCustom, calls=%fused_computation
  %input_transpose_fusion = f32[4,8]{1,0} fusion(%Arg_0), kind=kInput, calls=%fused_computation.1
  %add_fusion = f32[8]{0} fusion(%Arg_0), kind=kLoop, calls=%fused_computation.2
  %custom-call.1 = (f32[8]{0}, s8[16]{0}) custom-call(%Arg_0, %Arg_0), custom_call_target="__cublas$gemm"
  %custom-call.2 = f32[8]{0} custom-call(%Arg_0), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %custom-call.3 = f32[8]{0} custom-call(%Arg_0), custom_call_target="TopK"
  %all-reduce-start.1 = f32[8]{0} all-reduce-start(%Arg_0), to_apply=%fused_computation
  %all-gather.4 = f32[8]{0} all-gather(%Arg_0), dimensions={0}
  %copy-start.6 = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%Arg_0)
  ROOT %while.1 = (f32[8]{0}, /*index=1*/s32[]) while(%Arg_1), condition=%fused_computation, body=%fused_computation
}
"""


def test_what_kind_of_work_an_operation_is() -> None:
    step = classify_operations(PROGRAM)
    expected = {
        "gemm_fusion": "matmul",
        "input_transpose_fusion": "copy",
        "add_fusion": "other",
        "custom-call.1": "matmul",
        "custom-call.2": "matmul",
        "custom-call.3": "other",
        "all-reduce-start.1": "collective",
        "all-gather.4": "collective",
        "copy-start.6": "copy",
        "while.1": "other",
    }
    for name, kind in expected.items():
        assert step.find_kind("jit_train_step", name) == step.find_kind("", name) == kind, name
    assert step.is_foreign("jit_evaluate")
    assert not step.is_foreign("jit_train_step")
    assert not StepOperations().is_foreign("jit_evaluate")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collective"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("MemcpyD2D", "copy"),
        ("Memset", "copy"),
        ("loop_add_fusion", "other"),
        ("dot.3", "matmul"),
    ],
)
def test_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert classify_name(name) == kind


def plane(name: str, **lines: list[tuple[str, int, int, str, str]]) -> str:
    """A device's plane as text: by line, events of (name, begin, length, operation, module), in microseconds."""
    stats = {"hlo_op": 1, "hlo_module": 2}
    names = {event[0]: number for number, event in enumerate(sum(lines.values(), []), 1)}
    text = f'planes {{ name: "{name}" '
    for line, events in lines.items():
        text += f'lines {{ name: "{line}" timestamp_ns: 5000 '
        for event, begin, length, op, module in events:
            told = "".join(
                f'stats {{ metadata_id: {stats[key]} str_value: "{value}" }} '
                for key, value in (("hlo_op", op), ("hlo_module", module))
                if value
            )
            text += (
                f"events {{ metadata_id: {names[event]} offset_ps: {begin}000000 duration_ps: {length}000000 {told}}} "
            )
        text += "} "
    for event, number in names.items():
        text += f'event_metadata {{ key: {number} value {{ id: {number} name: "{event}" }} }} '
    for key, number in stats.items():
        text += f'stat_metadata {{ key: {number} value {{ id: {number} name: "{key}" }} }} '
    return text + "} "


def test_streams_of_a_gpu_share_what_they_do_at_once() -> None:
    step = "jit_train_step"
    compute = [
        ("kernel_a", 0, 40, "gemm_fusion", step),
        ("kernel_b", 40, 20, "add_fusion", step),
        ("kernel_c", 60, 30, "evaluation", "jit_evaluate"),  # of another program
    ]
    beside = [("ncclKernel", 30, 20, "", ""), ("MemcpyD2D", 60, 10, "", "")]
    text = plane("/device:GPU:0", **{"Stream #13(Compute)": compute, "Stream #14": beside, "Steps": compute})
    found = summarize_profile(ProfileData.from_text_proto(text), classify_operations(PROGRAM), 100e-6)
    # 30 alone and 10 shared; 10 and 10 shared, 10 alone; 10; the rest of 100.
    assert found.shares == {"matmul": 0.35, "copy": 0.1, "collective": 0.1, "other": 0.15, "idle": 0.3}
    assert [(each.name, each.kind, each.count) for each in found.operations] == [
        ("gemm_fusion", "matmul", 1),
        ("add_fusion", "other", 1),
        ("MemcpyD2D", "copy", 1),
        ("ncclKernel", "collective", 1),
    ]
    assert found.operations[0].seconds == pytest.approx(35e-6)


def test_an_operation_of_a_tpu_does_not_count_what_is_inside_of_it() -> None:
    operations = [
        ("%while.1 = (f32[8]{0}, s32[]) while(%Arg_1)", 0, 100, "", ""),
        ("%gemm_fusion = f32[8]{0} fusion(%Arg_0)", 10, 50, "", ""),
        ("%all-gather.4 = f32[8]{0} all-gather(%Arg_0)", 70, 20, "", ""),
    ]
    planes = [
        plane(
            f"/device:TPU:{number}", **{"XLA Modules": [("jit_train_step(1)", 0, 100, "", "")], "XLA Ops": operations}
        )
        for number in range(2)
    ]
    text = "".join([*planes, plane("/device:CUSTOM:Megascale Trace", **{"XLA Ops": operations})])
    found = summarize_profile(ProfileData.from_text_proto(text), classify_operations(PROGRAM), 200e-6)
    assert found.devices == 2
    assert found.shares == {"matmul": 0.25, "copy": 0.0, "collective": 0.1, "other": 0.15, "idle": 0.5}
    assert [(each.name, each.count) for each in found.operations] == [
        ("gemm_fusion", 2),
        ("while.1", 2),
        ("all-gather.4", 2),
    ]


def test_a_trace_without_operations_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="no operation of a device"):
        summarize_profile(
            ProfileData.from_text_proto(plane("/host:CPU", python=[("PjitFunction", 0, 9, "", "")])),
            StepOperations(),
            1.0,
        )


def test_a_real_trace_of_a_cpu(tmp_path: Path) -> None:
    step = jax.jit(lambda x: jnp.tanh(x @ x) @ x)
    value = jnp.ones((400, 400))
    compiled = step.lower(value).compile()
    step(value).block_until_ready()
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            jnp.sort(step(value).ravel()).block_until_ready()
    (trace,) = tmp_path.glob("**/*.xplane.pb")
    found = summarize_trace(trace, classify_operations(compiled.as_text() or ""), 10.0)
    products = [each for each in found.operations if each.kind == "matmul"]
    assert sum(each.count for each in products) == 6
    assert found.shares["matmul"] > found.shares["other"] > 0
    # Sorting is not part of the step.
    assert not any("sort" in each.name for each in found.operations)
    assert sum(found.shares.values()) == pytest.approx(1.0)
