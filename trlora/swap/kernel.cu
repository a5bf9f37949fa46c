// W' = W0 + sum_k s_k ( W0·(sum_q P_kq (x) Q_kq) + W0·(I (x) F_k) + D_k ), rounded once, for many layers of one width.
//
// A row of W0 is seen as a matrix of N_HI x N_LO, the fast index in front of memory. One block takes OB rows at a time, the
// next OB on their way into shared memory meanwhile; a warp takes 16 of the N_LO columns of a row. All products run on tensor
// cores in float32 sums; the factors come in the order in which a warp's lanes hold them (trlora/swap/fragments.py), and stay
// in registers as long as the layer does.
//
// Macros: IN columns of every STRIDE, N_LO (a multiple of 16); NA adapters, and a list with a number for each: TERMS q of its
// transform, PAIRS of the middle rank of its ring, or STEPS of 16 of its low rank; their sums NQ, NC, NR, of which NC or NR is
// 0; OB rows a block, WO rows at a time; HELD 1 where P stays in registers; BF16 0 or 1; MIN_CTAS.
#if BF16
#define HALF "bf16"
#define HALF_ONE 0x3f80u
#define HALF_INF 0x7f80u
#else
#define HALF "f16"
#define HALF_ONE 0x3c00u
#define HALF_INF 0x7c00u
#endif
typedef unsigned int u32;
typedef unsigned short u16;

#define N_HI (IN / N_LO)
#define KS (N_LO / 16)
#define IH ((N_HI + 7) / 8)
#define KH ((N_HI + 15) / 16)
#define IH2 (2 * KH)
#define WARPS (KS * WO)
#define THREADS (32 * WARPS)
#define LD (N_LO + 8)  // 16 bytes more than a row of the matrix: eight rows lie in different banks
#define ROW (N_HI * LD)
#define PAD ((16 * KH - N_HI) * LD)
#define CHUNKS (N_LO / 8)
#define RING (NC > 0 ? OB * 64 : 0)
#define BUFFER (OB * ROW + PAD + NA * RING)

__device__ __forceinline__ void mma(float *d, const u32 *a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." HALF "." HALF ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma8(float *d, uint2 a, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32." HALF "." HALF ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(b));
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn." HALF "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ uint2 scaled(float s, float4 f) { return make_uint2(pack(s * f.x, s * f.y), pack(s * f.z, s * f.w)); }
__device__ __forceinline__ float wide(u16 half) {
#if BF16
    return __uint_as_float((u32)half << 16);
#else
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(half));
    return r;
#endif
}
__device__ __forceinline__ u32 at(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ bool infinite(u32 pair) {
    return (pair & HALF_INF) == HALF_INF || ((pair >> 16) & HALF_INF) == HALF_INF;
}

constexpr int terms[NA] = {TERMS}, pairs[NA] = {PAIRS}, steps[NA] = {STEPS};
template <int N> __device__ constexpr int before(const int (&counts)[N], int adapter) {
    int sum = 0;
    for (int a = 0; a < adapter; ++a) sum += counts[a];
    return sum;
}

// weights, outs: a pointer a layer. tiles: layer, first row, rows, where the layer's rows begin in L.
// p, q, left, right, last: a pointer an adapter. wrong: one a layer, set where W' is not finite. s0 to s3: the strengths.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
swap(const u16 *const *__restrict__ weights, u16 *const *__restrict__ outs, const int4 *__restrict__ tiles, const int n_tiles,
     const int each, const uint4 *const *__restrict__ p, const float4 *const *__restrict__ q, const u16 *const *__restrict__ left,
     const uint2 *const *__restrict__ right, const float4 *const *__restrict__ last, int *__restrict__ wrong, const float s0,
     const float s1, const float s2, const float s3) {
    extern __shared__ __align__(16) u16 shared[];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, n = warp % KS;
    const float s[4] = {s0, s1, s2, s3};
    // what no row fills is multiplied by zeros, and must be finite
    for (int i = tid; i < 2 * BUFFER / 8; i += THREADS) ((uint4 *)shared)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    int number = blockIdx.x * each;
    const int stop = min(n_tiles, number + each);
    auto fetch = [&](int which, u16 *buffer) {
        const int4 tile = tiles[which];
        const u16 *source = weights[tile.x] + (long long)tile.y * STRIDE;
        for (int i = tid; i < tile.z * IN / 8; i += THREADS)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(buffer + (i / CHUNKS) * LD + (i % CHUNKS) * 8)),
                         "l"(source + (long long)(i / (IN / 8)) * STRIDE + (i % (IN / 8)) * 8));
#if NC > 0
#pragma unroll
        for (int k = 0; k < NA; ++k) {
            const u16 *l = left[k] + (long long)(tile.w + tile.y) * 64;
            for (int i = tid; i < tile.z * 8; i += THREADS)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(buffer + OB * ROW + PAD + k * RING + 8 * i)),
                             "l"(l + 8 * i));
        }
#endif
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    u32 one = 0;  // a fragment of the identity
    if (2 * t == (g & ~1)) one = (g & 1) ? (HALF_ONE << 16) : HALF_ONE;
    if (number < stop) fetch(number, shared);
    int had = -1, turn = 0;
#if NQ > 0
#if HELD
    uint4 pf[NQ][KS];
#endif
    uint2 qf[NQ + 1][KH][IH];
#endif
#if NC > 0
    uint2 cf[2 * NC], ef[NC][IH];
#endif
#pragma unroll 1
    for (; number < stop; ++number, turn ^= 1) {
        const int4 tile = tiles[number];
        const int layer = tile.x, rows = tile.z;
        if (layer != had) {
            had = layer;
#if NQ > 0
            float4 fixed[KH][IH];
#pragma unroll
            for (int k = 0; k < KH; ++k)
#pragma unroll
                for (int j = 0; j < IH; ++j) fixed[k][j] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int a = 0; a < NA; ++a) {
                if (terms[a] == 0) continue;
#if HELD
                const uint4 *from = p[a] + ((long long)layer * terms[a] * KS + n) * (KS * 32) + lane;
#pragma unroll
                for (int c = 0; c < terms[a]; ++c)
#pragma unroll
                    for (int k = 0; k < KS; ++k) pf[before(terms, a) + c][k] = __ldg(from + (c * KS * KS + k) * 32);
#endif
                const float4 *rest = q[a] + (long long)layer * (terms[a] + 1) * KH * (IH * 32) + lane;
#pragma unroll
                for (int c = 0; c <= terms[a]; ++c)
#pragma unroll
                    for (int k = 0; k < KH; ++k)
#pragma unroll
                        for (int j = 0; j < IH; ++j) {
                            const float4 f = __ldg(rest + ((c * KH + k) * IH + j) * 32);
                            if (c < terms[a]) {
                                qf[before(terms, a) + c][k][j] = scaled(s[a], f);
                            } else {
                                fixed[k][j].x += s[a] * f.x;
                                fixed[k][j].y += s[a] * f.y;
                                fixed[k][j].z += s[a] * f.z;
                                fixed[k][j].w += s[a] * f.w;
                            }
                        }
            }
#pragma unroll
            for (int k = 0; k < KH; ++k)
#pragma unroll
                for (int j = 0; j < IH; ++j) qf[NQ][k][j] = scaled(1.f, fixed[k][j]);
#endif
#if NC > 0
#pragma unroll
            for (int a = 0; a < NA; ++a) {
                const uint2 *from = right[a] + ((long long)layer * KS + n) * (2 * pairs[a] * 32) + lane;
                const float4 *rest = last[a] + (long long)layer * (pairs[a] * IH * 32) + lane;
#pragma unroll
                for (int c = 0; c < 2 * pairs[a]; ++c) cf[2 * before(pairs, a) + c] = __ldg(from + c * 32);
#pragma unroll
                for (int c = 0; c < pairs[a]; ++c)
#pragma unroll
                    for (int j = 0; j < IH; ++j)
                        ef[before(pairs, a) + c][j] = scaled(s[a], __ldg(rest + (c * IH + j) * 32));
            }
#endif
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        if (number + 1 < stop) fetch(number + 1, shared + (turn ^ 1) * BUFFER);
        const u16 *w = shared + turn * BUFFER;
#if NR > 0
        // the residual of the tile, 16 rows by 8 columns at a time, of which OB may be the first 8
        u16 *delta = shared + 2 * BUFFER;
#pragma unroll 1
        for (int block = 0; block < OB; block += 16) {
            u32 a[NR][4];
#pragma unroll
            for (int k = 0; k < NA; ++k) {
                const u32 *l = (const u32 *)left[k] + (long long)(tile.w + tile.y + block + g) * (steps[k] * 8) + t;
#pragma unroll
                for (int c = 0; c < steps[k]; ++c) {
                    u32 *f = a[before(steps, k) + c];
                    f[0] = __ldg(l + c * 8);
                    f[1] = __ldg(l + c * 8 + 8 * steps[k] * 8);
                    f[2] = __ldg(l + c * 8 + 4);
                    f[3] = __ldg(l + c * 8 + 8 * steps[k] * 8 + 4);
                }
            }
#pragma unroll 2
            for (int j = warp; j < IN / 8; j += WARPS) {
                float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int k = 0; k < NA; ++k) {
                    const uint2 *r = right[k] + ((long long)layer * (IN / 8) + j) * (steps[k] * 32) + lane;
                    float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                    for (int c = 0; c < steps[k]; ++c) {
                        const uint2 b = __ldg(r + c * 32);
                        mma(d, a[before(steps, k) + c], b.x, b.y);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) sum[i] += s[k] * d[i];
                }
                u16 *to = delta + (block + g) * ROW + (j / CHUNKS) * LD + (j % CHUNKS) * 8 + 2 * t;
                *(u32 *)to = pack(sum[0], sum[1]);
#if OB >= 16
                *(u32 *)(to + 8 * ROW) = pack(sum[2], sum[3]);
#endif
            }
        }
        __syncthreads();
#endif
        u16 *target = outs[layer] + (long long)tile.y * STRIDE + n * 16 + 2 * t;
        bool bad = false;
#pragma unroll 1
        for (int o = warp / KS; o < rows; o += WO) {
            const u16 *mine = w + o * ROW;
            float acc[IH][4];
#pragma unroll
            for (int j = 0; j < IH; ++j) {
#if NR > 0
                u32 low, high;
                const u32 from = at(delta + o * ROW + min(j * 8 + (lane & 7), N_HI - 1) * LD + n * 16 + (lane & 8));
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(low), "=r"(high) : "r"(from));
                acc[j][0] = wide((u16)low);
                acc[j][1] = wide((u16)(low >> 16));
                acc[j][2] = wide((u16)high);
                acc[j][3] = wide((u16)(high >> 16));
#else
                acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
#endif
            }
#pragma unroll
            for (int k = 0; k < KH; ++k) {
                u32 a[4];
                const u32 from = at(mine + (k * 16 + (lane & 7) + (lane >> 4) * 8) * LD + n * 16 + (lane & 8));
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from));
#pragma unroll
                for (int j = 0; j < IH; ++j) {
                    if (j / 2 == k) mma(acc[j], a, (j & 1) ? 0 : one, (j & 1) ? one : 0);
#if NQ > 0
                    mma(acc[j], a, qf[NQ][k][j].x, qf[NQ][k][j].y);
#endif
                }
            }
#if NC > 0
#pragma unroll
            for (int a = 0; a < NA; ++a) {
                const u32 l = ((const u32 *)(w + OB * ROW + PAD + a * RING + o * 64))[lane];
#pragma unroll
                for (int c = 0; c < pairs[a]; ++c) {
                    const int term = before(pairs, a) + c;
                    float u[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
                    mma8(u[0], cf[2 * term], l);
                    mma8(u[1], cf[2 * term + 1], l);
                    const u32 f[4] = {pack(u[0][0], u[0][1]), pack(u[0][2], u[0][3]), pack(u[1][0], u[1][1]), pack(u[1][2], u[1][3])};
#pragma unroll
                    for (int j = 0; j < IH; ++j) mma(acc[j], f, ef[term][j].x, ef[term][j].y);
                }
            }
#endif
#if NQ > 0
            u32 b[IH2][KS][2];
#pragma unroll
            for (int k = 0; k < KS; ++k)
#pragma unroll
                for (int i = 0; i < IH2; i += 2) {
                    const u32 from = at(mine + (i * 8 + (lane & 7) + (lane >> 4) * 8) * LD + k * 16 + (lane & 8));
                    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(b[i][k][0]), "=r"(b[i][k][1]), "=r"(b[i + 1][k][0]), "=r"(b[i + 1][k][1]) : "r"(from));
                }
#pragma unroll
            for (int a = 0; a < NA; ++a) {
#if !HELD
                const uint4 *from = p[a] + ((long long)layer * terms[a] * KS + n) * (KS * 32) + lane;
#endif
#pragma unroll
                for (int c = 0; c < terms[a]; ++c) {
                    const int term = before(terms, a) + c;
                    float z[IH2][4];
#pragma unroll
                    for (int i = 0; i < IH2; ++i) z[i][0] = z[i][1] = z[i][2] = z[i][3] = 0.f;
#pragma unroll
                    for (int k = 0; k < KS; ++k) {
#if HELD
                        const uint4 f = pf[term][k];
#else
                        const uint4 f = __ldg(from + (c * KS * KS + k) * 32);
#endif
#pragma unroll
                        for (int i = 0; i < IH; ++i) mma(z[i], (const u32 *)&f, b[i][k][0], b[i][k][1]);
                    }
#pragma unroll
                    for (int k = 0; k < KH; ++k) {
                        const u32 f[4] = {pack(z[2 * k][0], z[2 * k][1]), pack(z[2 * k][2], z[2 * k][3]),
                                          pack(z[2 * k + 1][0], z[2 * k + 1][1]), pack(z[2 * k + 1][2], z[2 * k + 1][3])};
#pragma unroll
                        for (int j = 0; j < IH; ++j) mma(acc[j], f, qf[term][k][j].x, qf[term][k][j].y);
                    }
                }
            }
#endif
            u16 *to = target + (long long)o * STRIDE;
#pragma unroll
            for (int j = 0; j < IH; ++j) {
                u32 low = pack(acc[j][0], acc[j][1]), high = pack(acc[j][2], acc[j][3]);
                asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(low));
                asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(high));
                if (j * 8 + g < N_HI) {
                    bad |= infinite(low) || infinite(high);
                    *(u32 *)(to + (j * 8 + g) * N_LO) = low;
                    *(u32 *)(to + (j * 8 + g) * N_LO + 8) = high;
                }
            }
        }
        if (bad) wrong[layer] = 1;
    }
}
