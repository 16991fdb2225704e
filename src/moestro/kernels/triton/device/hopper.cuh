// What CUDA C++ has no words for on sm_90: barriers and copies in shared memory, register shares, byte permutes, wgmma.
//
// Addresses in shared memory are 32 bits. Every instruction that is not C++ is here, so that a test may put functions of
// the same names in its place and run a kernel on a CPU (tests/kernels/triton/cuda_on_cpu.h); a product is Mma<width>,
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
DEV u8* shared_memory() {
  extern __shared__ __align__(1024) u8 memory[];
  return memory;
}
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
// What was written to shared memory by this thread, and by copy16 once it is known to be there, may be read by wgmma and
// copy_out.
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

template <int COUNT>
DEV void meet_threads() { asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory"); }  // the block's first COUNT, at barrier 1

// --- copies from shared memory -----------------------------------------------------------------------------------------
// Of multiples of 16 bytes, which were written before a fence_for_products().
DEV void copy_out(void* to, u32 from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
DEV void wait_for_copies_out() {  // until this thread's have read what they copy
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// --- clusters ----------------------------------------------------------------------------------------------------------
DEV int rank_in_cluster() {
  int r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEV void meet_cluster() {  // for barriers that publish_barriers has published; sync_cluster publishes everything
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEV void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEV void arrive_at(u32 bar, u32 rank) {  // the barrier that a block of the cluster has there, this one too
  asm volatile("{\n.reg .u32 t;\nmapa.shared::cluster.u32 t, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [t];\n}"
               ::"r"(bar), "r"(rank) : "memory");
}
// To each block of the mask, where its own barrier hears of it.
DEV void copy_box_to(u32 to, const Map* map, int column, int row, u32 bar, u16 mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(bar), "h"(mask) : "memory");
}

// --- shared memory to registers ------------------------------------------------------------------------------------------
DEV void load16(u32 (&to)[4], u32 from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}
// Two matrices of 8 x 16 bits, four bytes of each a lane, turned: each of their columns to the address of one of 16 lanes.
DEV void store_turned(u32 to, u32 first, u32 second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}
// Four matrices of 8 rows of 16 bytes, each row to the address of one lane, in order: four bytes of each of a lane.
DEV void store_matrices(u32 to, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
DEV void store16(u32 to, const u32 (&r)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
DEV void store_float(u32 to, float value) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory"); }
DEV float load_float(u32 from) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(from) : "memory");
  return r;
}
DEV u32 load4(u32 from) {
  u32 r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(from) : "memory");
  return r;
}
DEV u32 load1(u32 from) {
  u32 r;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(r) : "r"(from) : "memory");
  return r;
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

// --- an activation's functions, to 2 units of the last place -------------------------------------------------------------
DEV float power_of_two(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEV float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
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
