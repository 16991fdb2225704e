// The product of 64 rows, in registers or in shared memory, and @WIDTH@ others there; cuda_source.py puts the names in.
// run: part + a @ b, or a @ b; wait: until all products are there, and part may be read.
template <> struct Mma<@WIDTH@> {
  static __device__ __forceinline__ void run(float* part, const u32* a, u64 b, bool go_on) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, @GO_ON@, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n@WIDTH@k32.f32.e4m3.e4m3 {@SUMS@}, {@A@}, @B@, p, 1, 1;\n}"
        : @OUTPUTS@ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)go_on));
  }
  static __device__ __forceinline__ void run(float* part, u64 a, u64 b, bool go_on) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, @GO_ON_SHARED@, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n@WIDTH@k32.f32.e4m3.e4m3 {@SUMS@}, @A_SHARED@, @B_SHARED@, p, 1, 1;\n}"
        : @OUTPUTS@ : "l"(a), "l"(b), "r"((int)go_on));
  }
  static __device__ __forceinline__ void wait(float* part) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : @OUTPUTS@ :: "memory");
  }
};
