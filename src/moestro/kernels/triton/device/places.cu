// The place of each pair in the order that the sort has put them in: it gives the pair of each place.

struct Order { const int* sorted_pairs; int* places; i64 pairs; };

extern "C" __global__ void __launch_bounds__(256) invert(const __grid_constant__ Order p) {
  wait_for_previous();
  launch_next();
  int place = blockIdx.x * 256 + threadIdx.x;
  if (place < p.pairs) p.places[p.sorted_pairs[place]] = place;
}
