"""What is read of ops."""

import pytest

from mmjax.plan.hlo import Op, arrays_of, part_of


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "jit(step)/jvp(contrastive)/image/while/body/closed_call/attention/dot",
            "image/attention",
        ),
        ("jit(step)/transpose(jvp(contrastive))/text/add", "text"),
        ("jit(s)/transpose(jvp(matching))/fusion/while/body/checkpoint/mlp/add", "fusion/mlp"),
        ("jit(s)/jvp(matching)/rematted_computation/jit(_take)/gather", "matching"),
        ("jit(s)/jvp(image)/core/bqhd,bkhd->bhqk/dot_general", "image/core"),
        ("jit(s)/jvp(jit(_where))/select_n", ""),
        ("jit(s)/transpose(jvp(a))/shard_map/while/body/add", "a"),
        ("reduce_sum", ""),
    ],
)
def test_part_of(name, part):
    op = Op("x", "add", "f32[]", (), f', metadata={{op_name="{name}" stack_frame_id=3}}')
    assert "/".join(part_of(op)) == part


def test_arrays_of_a_shape():
    shape = "(bf16[2,3]{1,0:T(8,128)S(1)}, /*index=1*/s4[5]{0}, pred[7]{0}, f8e4m3fn[4]{0}, f32[])"
    found = arrays_of(shape)
    assert [array.bytes for array in found] == [12, 3, 7, 4, 4]
    assert [array.in_hbm for array in found] == [False, True, True, True, True]
