"""The reader of SASS on snippets made by hand: classes, loops, accesses."""

import pytest

pytest.importorskip("triton")

from benchmarks.compiled.counts import Counts, Loop, count_loop
from benchmarks.compiled.sass import CLASSES, accesses, classify, count_classes, innermost_loops, shared_bytes

SASS = """
        /*0000*/                   LDL R1, [R2] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0020*/                   STL [R1], R4 ;
.L_x_2:
        /*0030*/                   STG.E.U16 desc[UR8][R6.64], R4 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""

# of sm_80, sm_90, sm_100 and sm_120.
INSTRUCTIONS = {
    "tensor": [
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
        "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], tmem[UR6], idesc[UR7], UP0",
        "IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4",
        "DMMA.884 R4, R8, R12, R4",
    ],
    "mufu": ["MUFU.EX2 R3, R3", "MUFU.RCP R3, R3", "MUFU.SIN R3, R3"],
    "fp32": [
        *("FADD R1, R2, R3", "FMUL R1, R2, 1.5", "FFMA R1, R2, R3, R4", "FFMA2 R2, R4.F32x2.HI_LO, R6, R8"),
        *("FMNMX R1, R2, R3, !PT", "FMNMX3 R1, R2, R3, R4, !PT", "FSETP.GT.AND P0, PT, R1, R2, PT"),
        *("FSEL R1, R2, -INF, P0", "HFMA2.MMA R1, -RZ, RZ, 1.875, 0", "HFMA2 R1, R2, R3, R4", "FHADD.BF16 R1, R2, R3"),
    ],
    "fp64": ["DADD R2, R4, R6", "DFMA R2, R4, R6, R8", "DMUL R2, R4, R6"],
    "conversion": [
        *("F2FP.BF16.F32.PACK_AB R1, R2, R3", "F2F.F64.F32 R2, R1", "I2F.U32.RP R1, R2", "F2I.U64.TRUNC R2, R4"),
        *("I2FP.F32.S32 R1, R2", "UI2F UR1, UR2", "UF2I UR1, UR2"),
    ],
    "shared": [
        *("LDS.128 R4, [R8]", "STS.64 [R8], R4", "LDSM.16.MT88.4 R4, [R8]", "STSM.16.M88.4 [R8], R4"),
        *(
            "SHFL.BFLY PT, R1, R2, 0x1, 0x1f",
            "ATOMS.OR R1, [R2], R3",
            "LDTM.x32 R4, tmem[UR4]",
            "STTM.x8 tmem[UR4], R4",
        ),
    ],
    "global": [
        *("LDG.E.128 R4, desc[UR8][R2.64]", "STG.E.U16 desc[UR8][R6.64], R4", "RED.E.ADD.F32 [R2], R3"),
        *("LDGSTS.E.BYPASS.128 [R8], desc[UR8][R2.64]", "ATOMG.E.ADD R1, [R2], R3", "UTMALDG.2D [UR8], [UR4]"),
    ],
    "spill": ["LDL R1, [R2]", "STL.64 [R1], R4"],
    "integer": [
        *("IADD3 R1, R2, R3, RZ", "IMAD.WIDE R2, R3, 0x4, R4", "IMAD.MOV.U32 R1, RZ, RZ, R2", "VIADD R1, R2, 0x4"),
        *("LEA R1, R2, R3, 0x2", "LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT", "PLOP3.LUT P0, PT, P1, P2, PT, 0x80, 0x8"),
        *("ISETP.GE.AND P0, PT, R1, R2, PT", "SHF.R.U32.HI R1, RZ, 0x2, R2", "SEL R1, R2, R3, P0", "MOV R1, R2"),
        *(
            "PRMT R1, R2, 0x7632, R3",
            "CS2R R2, SRZ",
            "R2UR UR4, R1",
            "UIADD3 UR4, UR5, 0x1, URZ",
            "USHF.R.U32.HI UR4, URZ",
        ),
        *("VIMNMX R1, R2, R3, PT", "VIADDMNMX R1, R2, R3, R4, PT", "UMOV UR4, UR5", "ULOP3.LUT UR4, UR5, UR6, URZ"),
        *("USEL UR4, UR5, UR6, UP0", "SGXT.U32 R1, R2, 0x1", "UISETP.GE.AND UP0, UPT, UR4, UR5, UPT", "IABS R1, R2"),
    ],
    "other": [
        *(
            "BRA `(.L_x_1)",
            "BAR.SYNC.DEFER_BLOCKING 0x0",
            "EXIT",
            "NOP",
            "LDGDEPBAR",
            "DEPBAR.LE SB0, 0x1",
            "S2R R1, SR_TID.X",
        ),
        *(
            "LDC R1, c[0x0][0x210]",
            "LDCU UR4, c[0x0][0x210]",
            "ULDC UR4, c[0x0][0x210]",
            "WARPGROUP.ARRIVE",
            "UTCBAR [UR4], URZ",
        ),
        *(
            "UTCATOMSWS.AND URZ, UR4",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R4",
            "FENCE.VIEW.ASYNC.S",
            "MEMBAR.ALL.CTA",
        ),
    ],
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_are_of_the_class_of_their_pipe(name: str) -> None:
    assert {text: classify(text) for text in INSTRUCTIONS[name]} == dict.fromkeys(INSTRUCTIONS[name], name)


def test_every_instruction_counts_in_one_class() -> None:
    everything = [text for texts in INSTRUCTIONS.values() for text in texts]
    assert tuple(INSTRUCTIONS) == CLASSES
    assert count_classes(everything) == {name: len(texts) for name, texts in INSTRUCTIONS.items()}
    assert count_classes(["NOP"]) == {"other": 1}


def test_innermost_loops_are_found_with_their_accesses() -> None:
    instructions, loops = innermost_loops(SASS)
    assert len(instructions) == 8
    assert [[text.split()[0] for text in loop] for loop in loops] == [["STG.E.U16", "BRA"]]
    loop = count_loop(["LDG.E.128 R4", "LDG.E R5", "STL [R1]", "STG.E.64 R6"], threads=128, elements=256)
    assert (loop.spills, loop.reads, loop.writes) == (1, {"128": 1, "32": 1}, {"64": 1})
    assert (loop.bytes_read, loop.bytes_written) == (10, 4)


def test_copies_to_shared_memory_are_read_from_global_memory_and_written_to_shared() -> None:
    loop = count_loop(["LDGSTS.E.BYPASS.128 [R8], desc[UR8][R2.64]", "LDG.E R5"], threads=64, elements=32)
    assert (loop.reads, loop.copies, loop.bytes_read) == ({"32": 1}, {"128": 1}, 40)
    assert (loop.bytes_issued, loop.shared_bytes) == (64 * 20, 512)


def test_bytes_of_shared_memory_are_those_of_a_warp() -> None:
    texts = [
        "LDS.128 R4, [R8]",
        "STS [R8], R4",
        "LDSM.16.MT88.4 R4, [R8]",
        "STSM.16.M88 [R8], R4",
        "SHFL.BFLY PT, R1, R2",
    ]
    assert [shared_bytes([text]) for text in texts] == [512, 128, 512, 128, 128]
    assert shared_bytes([*texts, "LDG.E.128 R4", "FADD R1, R2, R3", "LDTM.x32 R4, tmem[UR4]"]) == sum(
        (512, 128, 512, 128, 128)
    )


def test_widths_are_those_of_an_access_not_of_a_matrix() -> None:
    assert accesses(
        ["LDG.E.U16 R1", "LDG.E.S8 R1", "LDG.E.CONSTANT R1", "LDG.E.64 R2", "LDGSTS.E.128 [R1]"], "LDG"
    ) == {
        "16": 1,
        "8": 1,
        "32": 1,
        "64": 1,
    }


def loop_of(**classes: int) -> Loop:
    return Loop(sum(classes.values()), classes, 0, {}, {}, {}, 0.0, 0.0, 0, 0)


@pytest.mark.parametrize(
    ("loops", "main"),
    [
        # the loop with masks does the same and more, a search does nothing of it.
        ([loop_of(tensor=8, integer=90), loop_of(tensor=8, integer=20), loop_of(integer=3)], 1),
        ([loop_of(tensor=2, integer=1), loop_of(tensor=8, integer=20)], 1),
        ([loop_of(fp32=64, integer=8), loop_of(fp32=8)], 0),
        ([loop_of(integer=5), loop_of(**{"global": 2})], 1),
        ([loop_of(integer=5)], None),
        ([], None),
    ],
)
def test_the_main_loop_is_the_shortest_of_those_that_do_the_work(loops: list[Loop], main: int | None) -> None:
    counts = Counts("", "", "", {}, 4, 0, 0, 32, 0, loops=loops)
    assert counts.main_loop is (None if main is None else loops[main])
