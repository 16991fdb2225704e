// What reading alone takes under the benchmarks' protocol: graph replay between two events, 256 MiB written
// (dirty) or read (clean) before each, medians of 9; and what a chain of trivial kernels takes.
//   nvcc -O3 -gencode=arch=compute_90a,code=sm_90a -o reads benchmarks/gpu_reads.cu && ./reads
// "ef": with the L2 policy evict_first. Plain loads (ld) do not allocate in L1, which has the same effect.
#include <cstdio>
#include <cstdint>
#include <vector>
#include <algorithm>
#include <cuda_runtime.h>
#define CK(x) do{cudaError_t e=(x); if(e!=cudaSuccess){printf("ERR %s line %d\n",cudaGetErrorString(e),__LINE__);exit(1);}}while(0)
__device__ __forceinline__ uint64_t pol_first(){uint64_t p; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;":"=l"(p)); return p;}
__device__ __forceinline__ uint32_t sm(void*p){return (uint32_t)__cvta_generic_to_shared(p);}
// V 0 plain ld.nc, 1 ld evict_first hint, 2 ld no_allocate L1 + evict_first
template<int V> __global__ void ldk(const uint4* p, size_t n16, uint32_t* out){
  uint64_t pol=pol_first(); uint32_t acc=0;
  size_t stride=(size_t)gridDim.x*blockDim.x; size_t i=(size_t)blockIdx.x*blockDim.x+threadIdx.x;
  for(;i<n16;i+=stride*8){
    uint4 v[8];
    #pragma unroll
    for(int u=0;u<8;u++){ size_t j=i+u*stride; v[u]=make_uint4(0,0,0,0); if(j<n16){
      if(V==0) asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];":"=r"(v[u].x),"=r"(v[u].y),"=r"(v[u].z),"=r"(v[u].w):"l"(p+j));
      else asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;":"=r"(v[u].x),"=r"(v[u].y),"=r"(v[u].z),"=r"(v[u].w):"l"(p+j),"l"(pol));
    }}
    #pragma unroll
    for(int u=0;u<8;u++) acc^=v[u].x^v[u].y^v[u].z^v[u].w;
  }
  if(acc==0x12345678) out[0]=acc;
}
// cp.async.cg 16 B, 4 stages of 128 thr * 4 * 16B = 8KB
template<int H> __global__ void cpk(const uint4* p, size_t n16, uint32_t* out){
  __shared__ uint4 buf[4][512]; uint64_t pol=pol_first(); uint32_t acc=0;
  size_t per=(n16+gridDim.x-1)/gridDim.x; per=(per+511)/512*512; size_t b=per*blockIdx.x; size_t e=min(b+per,n16);
  int steps=b<e?(int)((e-b)/512):0;
  auto issue=[&](int s){ if(s<steps){
    #pragma unroll
    for(int u=0;u<4;u++){ uint32_t d=sm(&buf[s&3][u*128+threadIdx.x]); const uint4* g=p+b+(size_t)s*512+u*128+threadIdx.x;
      if(H) asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"::"r"(d),"l"(g),"l"(pol));
      else asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"::"r"(d),"l"(g)); } }
    asm volatile("cp.async.commit_group;"); };
  for(int s=0;s<3;s++) issue(s);
  for(int s=0;s<steps;s++){ asm volatile("cp.async.wait_group 2;"); __syncthreads(); issue(s+3);
    #pragma unroll
    for(int u=0;u<4;u++){ uint4 v=buf[s&3][u*128+threadIdx.x]; acc^=v.x^v.y^v.z^v.w; } }
  if(acc==0x12345678) out[0]=acc;
}
// bulk copies: 4 stages of CH bytes
template<int H,int CH,int ST> __global__ void bulk(const char* p, size_t n, uint32_t* out){
  extern __shared__ __align__(128) char buf[]; __shared__ uint64_t bar[ST]; uint64_t pol=pol_first(); uint32_t acc=0;
  size_t chunks=n/CH; size_t per=(chunks+gridDim.x-1)/gridDim.x; size_t b=per*blockIdx.x; size_t e=min(b+per,chunks); int steps=b<e?(int)(e-b):0;
  if(threadIdx.x==0){ for(int i=0;i<ST;i++) asm volatile("mbarrier.init.shared.b64 [%0], 1;"::"r"(sm(&bar[i]))); asm volatile("fence.mbarrier_init.release.cluster;"); }
  __syncthreads();
  auto issue=[&](int s){ if(threadIdx.x==0 && s<steps){ uint32_t mb=sm(&bar[s%ST]);
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"::"r"(mb),"r"(CH));
    if(H) asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"::"r"(sm(buf+(size_t)(s%ST)*CH)),"l"(p+(b+s)*CH),"r"(CH),"r"(mb),"l"(pol):"memory");
    else asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"::"r"(sm(buf+(size_t)(s%ST)*CH)),"l"(p+(b+s)*CH),"r"(CH),"r"(mb):"memory"); } };
  for(int s=0;s<ST;s++) issue(s);
  for(int s=0;s<steps;s++){ uint32_t mb=sm(&bar[s%ST]); int ph=(s/ST)&1;
    asm volatile("{.reg .pred q; W: mbarrier.try_wait.parity.shared.b64 q, [%0], %1; @!q bra W;}"::"r"(mb),"r"(ph):"memory");
    acc^=*(uint32_t*)(buf+(size_t)(s%ST)*CH+threadIdx.x*4);
    __syncthreads(); issue(s+ST); }
  if(acc==0x12345678) out[0]=acc;
}
__global__ void triv(uint32_t* o){ asm volatile("griddepcontrol.wait;"); asm volatile("griddepcontrol.launch_dependents;"); if(threadIdx.x==0) o[blockIdx.x]=1; }
__global__ void rdflush(const uint4* p,size_t n,uint32_t*out){uint32_t a=0; for(size_t i=(size_t)blockIdx.x*blockDim.x+threadIdx.x;i<n;i+=(size_t)gridDim.x*blockDim.x){uint4 v=p[i];a^=v.x^v.y^v.z^v.w;} if(a==0x12345678) out[0]=a;}
__global__ void fillk(uint32_t*p,size_t n){for(size_t i=(size_t)blockIdx.x*blockDim.x+threadIdx.x;i<n;i+=(size_t)gridDim.x*blockDim.x)p[i]=(uint32_t)(i*2654435761u)^(uint32_t)(i>>7);}
template<class F> cudaGraphExec_t cap(cudaStream_t s,F f){ cudaGraph_t g; cudaGraphExec_t x; CK(cudaStreamBeginCapture(s,cudaStreamCaptureModeThreadLocal)); f(); CK(cudaStreamEndCapture(s,&g)); CK(cudaGraphInstantiate(&x,g,0)); return x;}
int main(){
  cudaStream_t s; CK(cudaStreamCreate(&s)); char *w,*fl; uint32_t*o; size_t W=(size_t)1<<30, FL=(size_t)256<<20;
  CK(cudaMalloc(&w,W)); CK(cudaMalloc(&fl,FL)); CK(cudaMalloc(&o,1<<20)); fillk<<<1024,256,0,s>>>((uint32_t*)w,W/4); CK(cudaStreamSynchronize(s));
  cudaEvent_t a,b; cudaEventCreate(&a); cudaEventCreate(&b);
  auto med=[&](cudaGraphExec_t x,int mode){ std::vector<float> t; for(int i=0;i<11;i++){ if(mode==0) CK(cudaMemsetAsync(fl,0,FL,s)); else rdflush<<<1056,256,0,s>>>((uint4*)fl,FL/16,o); cudaEventRecord(a,s); cudaGraphLaunch(x,s); cudaEventRecord(b,s); CK(cudaEventSynchronize(b)); float ms; cudaEventElapsedTime(&ms,a,b); if(i>1)t.push_back(ms*1e3f);} std::sort(t.begin(),t.end()); return t[t.size()/2]; };
  for(int k=1;k<=5;k++){ for(int pdl=0;pdl<2;pdl++){ auto x=cap(s,[&]{ for(int i=0;i<k;i++){ cudaLaunchConfig_t c={}; c.gridDim=264;c.blockDim=128;c.stream=s; cudaLaunchAttribute at; at.id=cudaLaunchAttributeProgrammaticStreamSerialization; at.val.programmaticStreamSerializationAllowed=1; c.attrs=&at;c.numAttrs=pdl; CK(cudaLaunchKernelEx(&c,triv,o)); }});
    printf("%d trivial kernels pdl=%d: dirty %.2f clean %.2f us\n",k,pdl,med(x,0),med(x,1)); }}
  CK(cudaFuncSetAttribute((const void*)bulk<0,16384,4>,cudaFuncAttributeMaxDynamicSharedMemorySize,65536)); CK(cudaFuncSetAttribute((const void*)bulk<1,16384,4>,cudaFuncAttributeMaxDynamicSharedMemorySize,65536));
  CK(cudaFuncSetAttribute((const void*)bulk<0,8192,6>,cudaFuncAttributeMaxDynamicSharedMemorySize,49152)); CK(cudaFuncSetAttribute((const void*)bulk<1,8192,6>,cudaFuncAttributeMaxDynamicSharedMemorySize,49152));
  for(int mb: {21,80,198,332,520,793}){ size_t n=(size_t)mb*1000000/65536*65536;
    struct R{const char*n;cudaGraphExec_t x;}; std::vector<R> r;
    r.push_back({"ld",cap(s,[&]{ldk<0><<<132*8,256,0,s>>>((uint4*)w,n/16,o);})});
    r.push_back({"ld ef",cap(s,[&]{ldk<1><<<132*8,256,0,s>>>((uint4*)w,n/16,o);})});
    r.push_back({"cp",cap(s,[&]{cpk<0><<<132*6,128,0,s>>>((uint4*)w,n/16,o);})});
    r.push_back({"cp ef",cap(s,[&]{cpk<1><<<132*6,128,0,s>>>((uint4*)w,n/16,o);})});
    r.push_back({"bulk16x4 x3",cap(s,[&]{bulk<0,16384,4><<<132*3,128,65536,s>>>(w,n,o);})});
    r.push_back({"bulk16x4 x3 ef",cap(s,[&]{bulk<1,16384,4><<<132*3,128,65536,s>>>(w,n,o);})});
    r.push_back({"bulk8x6 x4",cap(s,[&]{bulk<0,8192,6><<<132*4,128,49152,s>>>(w,n,o);})});
    r.push_back({"bulk8x6 x4 ef",cap(s,[&]{bulk<1,8192,6><<<132*4,128,49152,s>>>(w,n,o);})});
    printf("%d MB:",mb); for(auto&q:r){ float d=med(q.x,0),c=med(q.x,1); printf(" [%s] %.1f/%.1f",q.n,d,c);} printf("  (3.0 TB/s = %.1f)\n",n/3.0e6); }
  CK(cudaDeviceSynchronize()); return 0; }
