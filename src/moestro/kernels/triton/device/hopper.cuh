// What CUDA C++ has no words for on sm_90: barriers and copies in shared memory, register shares, byte permutes, wgmma.
//
// Addresses in shared memory are 32 bits. Every instruction that is not C++ is here, so that a test may put functions of
// the same names in its place and run a kernel on a CPU (tests/kernels/triton/cuda_on_cpu.h); a product is Mma<pairs>,
// which cuda_source.py writes for each width. PTX ISA 8.x names the instructions.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEV static __device__ __forceinline__

struct alignas(64) Map { u64 words[16]; };  // a CUtensorMap

// --- programmatic launch ------------------------------------------------------------------------------------------
DEV void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEV void launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// --- registers of a group of four warps ------------------------------------------------------------------------------
template <int COUNT>
DEV void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
DEV void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
// What follows from a value is worked out again after this, not kept in registers.
DEV void forget(u32& value) { asm volatile("" : "+r"(value)); }

// --- barriers in shared memory ---------------------------------------------------------------------------------------
DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV void init(u32 bar, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
DEV void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
DEV void expect(u32 bar, int bytes) {  // and arrive
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEV void wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, 0x989680;\n@p bra DONE;\n"
      "bra AGAIN;\nDONE:\n}" ::"r"(bar), "r"(parity) : "memory");
}
// Arrives once all copies that this thread has started by copy4 and copy16 are there.
DEV void arrive_when_copied(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// What was written to shared memory by copy16, once it is known to be there, may be read by wgmma.
DEV void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- copies to shared memory -------------------------------------------------------------------------------------------
DEV void copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
DEV void copy16(u32 to, const void* from, int bytes = 16) {  // zeros where bytes is 0
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEV void copy_bytes(u32 to, const u8* from, int bytes, u32 bar) {  // multiples of 16, which bar expects
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
DEV void copy_box(u32 to, const Map* map, int column, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(bar) : "memory");
}

// --- shared memory to registers ------------------------------------------------------------------------------------------
DEV void load16(u32 (&to)[4], u32 from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}
DEV u32 load2(u32 from) {
  u32 r;
  asm volatile("{\n.reg .u16 t;\nld.shared.u16 t, [%1];\ncvt.u32.u16 %0, t;\n}" : "=r"(r) : "r"(from) : "memory");
  return r;
}

// --- bytes -----------------------------------------------------------------------------------------------------------
DEV u32 permute(u32 a, u32 b, u32 selector) {  // prmt: nibbles 8..15 of the selector give the sign of byte - 8
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
template <int TABLE>
DEV u32 logic(u32 a, u32 b, u32 c) {  // lop3: bit 4 a + 2 b + c of the table
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return r;
}
DEV u32 two_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV u16 two_e4m3(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
DEV float half_to_float(u16 h) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
}
DEV float bf16_to_float(u16 h) { return __uint_as_float((u32)h << 16); }
DEV u32 transposed(u32 r) {  // 8 x 8 of 16 bits, a row for each four lanes
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(r));
  return r;
}

// --- products ----------------------------------------------------------------------------------------------------------
DEV void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEV void wait_for_all_but_one() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
// Rows of 128 bytes, swizzled as copy_box with its 128 bytes writes them; 8 rows are 1024 bytes.
DEV u64 operand(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
