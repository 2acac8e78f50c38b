// What autograd asks of a device: with a guard in Python an error on its device threads would end the process.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kPretend = c10::DeviceType::PrivateUse1;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kPretend> {
  c10::Device exchangeDevice(c10::Device) const override { return {kPretend, 0}; }
  c10::Device getDevice() const override { return {kPretend, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kPretend, 0));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace
