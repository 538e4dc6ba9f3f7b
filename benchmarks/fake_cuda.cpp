// What PyTorch's autograd asks of a CUDA device, answered without one: the device is there, and
// nothing ever has to be waited for. Loaded by fake_cuda.py before PyTorch.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::Stream;

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
    Device exchangeDevice(Device) const override { return getDevice(); }
    Stream getStream(Device) const noexcept override {
        return Stream(Stream::DEFAULT, getDevice());
    }
    Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
    void record(void **, const Stream &, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void *, const Stream &) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

} // namespace

namespace at {

struct CUDAHooks : CUDAHooksInterface {
    explicit CUDAHooks(CUDAHooksArgs) {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return false; }
};

REGISTER_CUDA_HOOKS(CUDAHooks); // under the class's name, which PyTorch looks for

} // namespace at
